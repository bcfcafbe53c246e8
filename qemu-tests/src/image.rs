//! What `image/build` left in the cache, as its `image.json` describes it. Reads, never builds.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

/// A built image: the disk, and kernel, initrd and command line for direct boot.
#[derive(Debug, Clone)]
pub struct Image {
    directory: PathBuf,
    /// Partitions and content, as built.
    pub description: Description,
}

/// The content of `image.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Format of this description.
    pub version: u32,
    /// The partitions of the shipped disk. The data partition is not among them: the appliance makes it.
    pub partitions: Vec<Partition>,
}

/// One partition of the shipped disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Partition {
    /// GPT label.
    pub name: String,
    /// First byte on the disk.
    pub start: u64,
    /// Length in bytes.
    pub size: u64,
    /// Changes whenever the content does.
    pub content: String,
}

impl Description {
    /// Whether both disks have the same partitions in the same places, whatever is in them.
    #[must_use]
    pub fn same_layout(&self, other: &Self) -> bool {
        let places = |description: &Self| -> Vec<(String, u64, u64)> {
            description.partitions.iter().map(|p| (p.name.clone(), p.start, p.size)).collect()
        };
        places(self) == places(other)
    }

    /// The partitions whose content differs from the other's partition of the same name.
    #[must_use]
    pub fn changed_from<'a>(&'a self, other: &Self) -> Vec<&'a Partition> {
        self.partitions.iter().filter(|mine| !other.partitions.contains(mine)).collect()
    }

    /// Reads one from a file.
    ///
    /// # Errors
    /// When there is none or it is of another version.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let description: Self =
            serde_json::from_slice(&text).with_context(|| format!("{} is damaged", path.display()))?;
        if description.version != 1 {
            bail!("{} has version {}, this runner knows 1", path.display(), description.version);
        }
        Ok(description)
    }
}

impl Image {
    /// The image in the cache, or in the directory that `PANDASTACK_IMAGE` names.
    ///
    /// # Errors
    /// When it has not been built.
    pub fn find() -> Result<Self> {
        let directory = match std::env::var_os("PANDASTACK_IMAGE") {
            Some(directory) => PathBuf::from(directory),
            None => cache()?.join("image"),
        };
        Self::at(directory)
    }

    /// The image in a given directory.
    ///
    /// # Errors
    /// When it is not there or not complete.
    pub fn at(directory: PathBuf) -> Result<Self> {
        let description = Description::read(&directory.join("image.json"))
            .context("no appliance image; build it with `make image`")?;
        let image = Self { directory, description };
        for path in [image.disk(), image.kernel(), image.initrd()] {
            if !path.exists() {
                bail!("{} is missing; build the image with `make image`", path.display());
            }
        }
        Ok(image)
    }

    /// The disk, raw.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.directory.join("pandastack.raw")
    }

    /// The kernel, for direct boot.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.directory.join("vmlinuz")
    }

    /// The initrd, for direct boot.
    #[must_use]
    pub fn initrd(&self) -> PathBuf {
        self.directory.join("initrd")
    }

    /// The kernel command line that the UKI carries.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn command_line(&self) -> Result<String> {
        let path = self.directory.join("cmdline");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(text.trim().to_owned())
    }
}

/// The project's cache directory.
///
/// # Errors
/// When neither `XDG_CACHE_HOME` nor `HOME` is set.
pub fn cache() -> Result<PathBuf> {
    let base = match (std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME")) {
        (Some(cache), _) if !cache.is_empty() => PathBuf::from(cache),
        (_, Some(home)) => PathBuf::from(home).join(".cache"),
        _ => bail!("neither XDG_CACHE_HOME nor HOME is set"),
    };
    Ok(base.join("pandastack"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn description(content: &[&str]) -> Description {
        let partitions = content
            .iter()
            .enumerate()
            .map(|(i, content)| Partition {
                name: format!("p{i}"),
                start: i as u64 * 4096,
                size: 4096,
                content: (*content).to_owned(),
            })
            .collect();
        Description { version: 1, partitions }
    }

    #[test]
    fn changes_are_found_by_content() {
        let (old, new) = (description(&["a", "b", "c"]), description(&["a", "x", "c"]));
        assert!(new.same_layout(&old));
        let changed: Vec<&str> = new.changed_from(&old).iter().map(|p| p.name.as_str()).collect();
        assert_eq!(changed, ["p1"]);
        assert!(new.changed_from(&new).is_empty());
    }

    #[test]
    fn a_moved_partition_is_another_layout() {
        let old = description(&["a", "b"]);
        let mut new = old.clone();
        new.partitions[1].start += 512;
        assert!(!new.same_layout(&old));
        assert!(!description(&["a"]).same_layout(&old));
    }
}
