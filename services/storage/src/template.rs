//! The catalogue: what `template.toml` says, checked. Owns no file but reads them; knows nothing of imports or bakes.

use std::{collections::BTreeMap, fmt, fs, io, path::Path, str::FromStr};

use pandastack_daemon::{chain, files};
use serde::{Deserialize, Deserializer, Serialize};

use crate::{layout, sandbox};

/// Longest description, bytes.
const DESCRIPTION_LIMIT: u64 = 256 * 1024;

/// 1 to 64 of `A-Za-z0-9._-`, but neither `.` nor `..`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct TemplateName(String);

/// The text is no template's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not the name of a template: 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-' are expected")]
pub struct BadName;

/// What a template is, as it says itself.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Template {
    /// Its name: that of its folder.
    pub name: TemplateName,
    /// Other names by which it may be asked for.
    #[serde(default)]
    pub aliases: Vec<TemplateName>,
    /// One sentence.
    #[serde(default)]
    pub description: String,
    /// `base`, `data`, `agents` or `custom`.
    #[serde(default = "custom")]
    pub category: String,
    /// Tools a user finds in it.
    #[serde(default)]
    pub tools: Vec<String>,
    /// For the appliance itself: in no list, nobody's to create from, baked when it is needed.
    #[serde(default)]
    pub hidden: bool,
    /// Virtual processors, 1 to 32.
    pub vcpus: u32,
    /// Guest memory in MiB, 64 to 1048576.
    pub memory_mib: u64,
    /// Root disk in MiB, 16 to 1048576 (1 TiB).
    pub disk_mib: u64,
    /// Environment of every exec.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Where an exec starts.
    #[serde(default = "root_directory")]
    pub workdir: String,
    /// Shell command run before the capture; may be empty.
    #[serde(default)]
    pub warmup: String,
}

/// A template with the text it came from, which is part of what a bake depends on.
#[derive(Debug, Clone, PartialEq)]
pub struct Described {
    /// What it says.
    pub template: Template,
    /// The text itself.
    pub text: String,
}

impl TemplateName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for TemplateName {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        let good = (1..=64).contains(&text.len())
            && !matches!(text, "." | "..")
            && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if good { Ok(Self(text.to_owned())) } else { Err(BadName) }
    }
}

impl fmt::Display for TemplateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for TemplateName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Reads every template below `directory`. A template that cannot be used is logged and left out; the rest goes on.
///
/// # Errors
/// The directory itself cannot be read.
pub fn read_catalogue(directory: &Path) -> io::Result<BTreeMap<TemplateName, Described>> {
    let mut catalogue = BTreeMap::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if !path.is_dir() {
            continue;
        }
        match read_one(&path) {
            Ok(Some(found)) => drop(catalogue.insert(found.template.name.clone(), found)),
            // `lost+found`, or something that is not meant for us.
            Ok(None) => tracing::debug!("{}: no {}", path.display(), layout::DESCRIPTION),
            Err(reason) => tracing::error!("{}: left out of the catalogue: {reason}", path.display()),
        }
    }
    drop_ambiguous_aliases(&mut catalogue);
    Ok(catalogue)
}

/// Parses and checks a description.
///
/// # Errors
/// One sentence on what is wrong.
pub fn parse(text: &str) -> Result<Template, String> {
    let template: Template = toml::from_str(text).map_err(|error| error.message().to_owned())?;
    check(&template)?;
    Ok(template)
}

/// Whether a template can be run.
///
/// # Errors
/// One sentence on what is wrong.
pub fn check(template: &Template) -> Result<(), String> {
    let bounds = [
        ("vcpus", u64::from(template.vcpus), 1, 32),
        ("memory_mib", template.memory_mib, 64, 1024 * 1024),
        ("disk_mib", template.disk_mib, 16, sandbox::DISK_LIMIT_MIB),
    ];
    for (field, value, least, most) in bounds {
        if !(least..=most).contains(&value) {
            return Err(format!("{field} is {value}, but has to be {least} to {most}"));
        }
    }
    if !template.workdir.starts_with('/') || template.workdir.contains('\0') {
        return Err(format!("workdir {:?} is not an absolute path", template.workdir));
    }
    if let Some(name) = template.env.keys().find(|name| name.is_empty() || name.contains(['=', '\0'])) {
        return Err(format!("{name:?} cannot be the name of a variable"));
    }
    Ok(())
}

fn read_one(folder: &Path) -> Result<Option<Described>, String> {
    let bytes = match files::read_limited(&folder.join(layout::DESCRIPTION), DESCRIPTION_LIMIT) {
        Ok(Some(bytes)) => bytes,
        Ok(None) => return Ok(None),
        Err(error) => return Err(chain(&error)),
    };
    let text = String::from_utf8(bytes).map_err(|error| error.to_string())?;
    let template = parse(&text)?;
    if folder.file_name().and_then(|name| name.to_str()) != Some(template.name.as_str()) {
        return Err(format!("it calls itself {}", template.name));
    }
    Ok(Some(Described { template, text }))
}

/// A name always wins over an alias, and an alias belongs to the first template (by name) that claims it.
fn drop_ambiguous_aliases(catalogue: &mut BTreeMap<TemplateName, Described>) {
    let mut taken: Vec<TemplateName> = catalogue.keys().cloned().collect();
    for described in catalogue.values_mut() {
        let Template { name, aliases, .. } = &mut described.template;
        aliases.retain(|alias| {
            let free = !taken.contains(alias);
            if free {
                taken.push(alias.clone());
            } else {
                tracing::error!("template {name}: the alias {alias} is taken already");
            }
            free
        });
    }
}

fn custom() -> String {
    "custom".into()
}

fn root_directory() -> String {
    "/".into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = "name = 'base'\naliases = ['ubuntu-24.04']\nvcpus = 2\nmemory_mib = 2048\ndisk_mib = 12288\nlabel = 'x'\n[env]\nLANG = 'C.UTF-8'\n";

    fn folder(root: &Path, name: &str, text: &str) {
        fs::create_dir(root.join(name)).unwrap();
        fs::write(root.join(name).join("template.toml"), text).unwrap();
    }

    #[test]
    fn a_description_is_read() {
        let template = parse(GOOD).unwrap();
        assert_eq!((template.vcpus, template.memory_mib, template.disk_mib), (2, 2048, 12288));
        assert_eq!(template.aliases[0].as_str(), "ubuntu-24.04");
        assert_eq!(template.env["LANG"], "C.UTF-8");
        assert_eq!(template.category, "custom");
    }

    #[test]
    fn what_cannot_be_run_is_refused() {
        for (from, to) in [
            ("vcpus = 2", "vcpus = 0"),
            ("vcpus = 2", "vcpus = 'two'"),
            ("memory_mib = 2048", "memory_mib = 3"),
            ("disk_mib = 12288", "disk_mib = -1"),
            ("'base'", "'../base'"),
            ("'ubuntu-24.04'", "'..'"),
            ("[env]", "workdir = 'here'\n[env]"),
            ("LANG", "'A=B'"),
        ] {
            let text = GOOD.replace(from, to);
            assert_ne!(text, GOOD);
            assert!(parse(&text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_bad_template_does_not_hide_the_others_and_names_win_over_aliases() {
        let dir = tempfile::tempdir().unwrap();
        folder(dir.path(), "base", GOOD);
        folder(dir.path(), "other", &GOOD.replace("'base'", "'other'").replace("['", "['base', 'mine', '"));
        folder(dir.path(), "liar", GOOD);
        folder(dir.path(), "broken", "name = ");
        fs::create_dir(dir.path().join("lost+found")).unwrap();

        let catalogue = read_catalogue(dir.path()).unwrap();

        let names: Vec<_> = catalogue.keys().map(TemplateName::as_str).collect();
        assert_eq!(names, ["base", "other"]);
        let aliases = &catalogue[&"other".parse::<TemplateName>().unwrap()].template.aliases;
        assert_eq!(aliases.iter().map(TemplateName::as_str).collect::<Vec<_>>(), ["mine"]);
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in ".{0,200}") {
            let _ = parse(&text);
        }
    }
}
