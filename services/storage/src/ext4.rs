//! Which parts of an ext4 image are in use, from its block bitmaps.
//!
//! erofs reports no holes, and reading gigabytes of zeros out of it takes minutes: so an import reads only what ext4
//! says is allocated. Pure but for the given reads; it refuses to know what is in the blocks. Whatever it does not
//! understand is answered with `None`, and then everything is read.

use std::{io, ops::Range};

const SUPERBLOCK: u64 = 1024;
const MAGIC: u16 = 0xEF53;
const NEEDS_RECOVERY: u32 = 0x4;
const JOURNAL_DEVICE: u32 = 0x8;
const META_BG: u32 = 0x10;
const SIXTY_FOUR_BIT: u32 = 0x80;
const BIGALLOC: u32 = 0x200;
const BLOCK_BITMAP_UNINITIALISED: u16 = 0x2;

/// Byte ranges of `image` that are allocated: sorted, not touching, within `length` (bytes). A superset is possible,
/// a subset is not. `None` when it is not an ext4 (or not one whose bitmaps can be trusted as they stand).
///
/// # Errors
/// A read failed.
pub fn allocated(
    length: u64,
    mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<Option<Vec<Range<u64>>>> {
    let mut bytes = [0; 1024];
    if length < SUPERBLOCK + 1024 {
        return Ok(None);
    }
    read(SUPERBLOCK, &mut bytes)?;
    let Some(geometry) = Geometry::parse(&bytes, length) else { return Ok(None) };
    let table = (geometry.first_data_block + 1) * geometry.block_size;
    let table_length = geometry.groups * geometry.descriptor_size;
    if table + table_length > length {
        return Ok(None);
    }
    let mut descriptors = vec![0; to_usize(table_length)];
    read(table, &mut descriptors)?;

    let mut blocks = Blocks::new(&geometry);
    blocks.add(0..geometry.first_data_block + 1);
    let table_blocks = table_length.div_ceil(geometry.block_size) + geometry.reserved_descriptor_blocks;
    let inode_table_blocks = (geometry.inodes_per_group * geometry.inode_size).div_ceil(geometry.block_size);
    let mut bitmap = vec![0; to_usize(geometry.block_size)];
    for (group, descriptor) in (0..).zip(descriptors.chunks_exact(to_usize(geometry.descriptor_size))) {
        let start = geometry.first_data_block + group * geometry.blocks_per_group;
        // Not every group begins with a copy of the superblock, but looking costs nothing: zeros are not written.
        blocks.add(start..start + 1 + table_blocks);
        let block_bitmap = geometry.address(descriptor, 0x0, 0x20);
        let inode_table = geometry.address(descriptor, 0x8, 0x28);
        blocks.add(one(block_bitmap));
        blocks.add(one(geometry.address(descriptor, 0x4, 0x24)));
        blocks.add(inode_table..inode_table.saturating_add(inode_table_blocks));
        if u16_at(descriptor, 0x12) & BLOCK_BITMAP_UNINITIALISED != 0 {
            continue;
        }
        if block_bitmap >= geometry.blocks {
            return Ok(None);
        }
        read(block_bitmap * geometry.block_size, &mut bitmap)?;
        for bit in 0..geometry.blocks_per_group {
            if bitmap[to_usize(bit / 8)] & (1 << (bit % 8)) != 0 {
                blocks.add(one(start + bit));
            }
        }
    }
    let mut ranges = blocks.ranges();
    // Whatever lies behind the file system (there should be nothing) is not ours to judge.
    let end = geometry.blocks * geometry.block_size;
    match ranges.last_mut() {
        Some(last) if last.end == end => last.end = length,
        _ if end < length => ranges.push(end..length),
        _ => {}
    }
    Ok(Some(ranges))
}

/// What of the superblock matters here.
struct Geometry {
    block_size: u64,
    blocks: u64,
    first_data_block: u64,
    blocks_per_group: u64,
    inodes_per_group: u64,
    inode_size: u64,
    groups: u64,
    descriptor_size: u64,
    reserved_descriptor_blocks: u64,
}

impl Geometry {
    fn parse(bytes: &[u8; 1024], length: u64) -> Option<Self> {
        let incompatible = u32_at(bytes, 0x60);
        let strange = NEEDS_RECOVERY | JOURNAL_DEVICE | META_BG;
        if u16_at(bytes, 0x38) != MAGIC || incompatible & strange != 0 || u32_at(bytes, 0x64) & BIGALLOC != 0
        {
            return None;
        }
        let wide = incompatible & SIXTY_FOUR_BIT != 0;
        let block_size =
            1024_u64.checked_shl(u32_at(bytes, 0x18)).filter(|size| (1024..=65536).contains(size))?;
        let high = if wide { u64::from(u32_at(bytes, 0x150)) << 32 } else { 0 };
        let blocks = high | u64::from(u32_at(bytes, 0x4));
        let first_data_block = u64::from(u32_at(bytes, 0x14));
        let blocks_per_group = u64::from(u32_at(bytes, 0x20));
        let descriptor_size = if wide { u64::from(u16_at(bytes, 0xFE)) } else { 32 };
        let sound = blocks.checked_mul(block_size)? <= length
            && first_data_block < 2
            && first_data_block < blocks
            && (1024..=block_size * 8).contains(&blocks_per_group)
            && blocks_per_group % 8 == 0
            && (32..=1024).contains(&descriptor_size)
            && (!wide || descriptor_size >= 64);
        sound.then(|| Self {
            block_size,
            blocks,
            first_data_block,
            blocks_per_group,
            inodes_per_group: u64::from(u32_at(bytes, 0x28)),
            inode_size: u64::from(u16_at(bytes, 0x58)),
            groups: (blocks - first_data_block).div_ceil(blocks_per_group),
            descriptor_size,
            reserved_descriptor_blocks: u64::from(u16_at(bytes, 0xCE)),
        })
    }

    fn address(&self, descriptor: &[u8], low: usize, high: usize) -> u64 {
        let upper = if self.descriptor_size >= 64 { u64::from(u32_at(descriptor, high)) << 32 } else { 0 };
        upper | u64::from(u32_at(descriptor, low))
    }
}

/// Blocks in use, as runs; kept small by joining neighbours when they come in order.
struct Blocks {
    runs: Vec<Range<u64>>,
    end: u64,
    size: u64,
}

impl Blocks {
    fn new(geometry: &Geometry) -> Self {
        Self { runs: Vec::new(), end: geometry.blocks, size: geometry.block_size }
    }

    fn add(&mut self, run: Range<u64>) {
        let run = run.start..run.end.min(self.end);
        match self.runs.last_mut() {
            _ if run.is_empty() => {}
            Some(last) if last.end == run.start => last.end = run.end,
            _ => self.runs.push(run),
        }
    }

    fn ranges(mut self) -> Vec<Range<u64>> {
        self.runs.sort_unstable_by_key(|run| run.start);
        let mut joined: Vec<Range<u64>> = Vec::new();
        for run in self.runs {
            let run = run.start * self.size..run.end * self.size;
            match joined.last_mut() {
                Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
                _ => joined.push(run),
            }
        }
        joined
    }
}

fn one(block: u64) -> Range<u64> {
    block..block.saturating_add(1)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn to_usize(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::FileExt, path::Path, process::Command};

    use proptest::prelude::*;

    use super::*;

    fn image(directory: &Path, options: &[&str], mib: u64) -> fs::File {
        let (tree, path) = (directory.join("tree"), directory.join("image"));
        fs::create_dir_all(tree.join("a/b")).unwrap();
        for number in 0..300 {
            fs::write(tree.join(format!("a/b/{number}")), vec![b'x'; number * 500]).unwrap();
        }
        let mut command = Command::new("mkfs.ext4");
        command.args(["-q", "-F", "-d"]).arg(&tree).args(options).arg(&path).arg(format!("{mib}M"));
        let made = command.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").status().unwrap();
        assert!(made.success());
        fs::File::open(path).unwrap()
    }

    #[test]
    fn outside_of_what_is_allocated_a_fresh_file_system_has_nothing() {
        for (options, mib) in [
            (&["-b", "4096"][..], 400),
            (&["-b", "1024"], 64),
            (&["-b", "4096", "-O", "^64bit,^flex_bg,^metadata_csum"], 300),
            (&["-b", "2048", "-O", "^resize_inode,sparse_super2"], 200),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let file = image(dir.path(), options, mib);
            let length = file.metadata().unwrap().len();
            let ranges = allocated(length, |at, bytes| file.read_exact_at(bytes, at)).unwrap().unwrap();

            let mut bytes = fs::read(dir.path().join("image")).unwrap();
            let total: u64 = ranges.iter().map(|range| range.end - range.start).sum();
            assert!(total < length / 2, "{options:?}: {total} of {length} bytes are said to be in use");
            for range in &ranges {
                assert!(range.end <= length);
                bytes[to_usize(range.start)..to_usize(range.end)].fill(0);
            }
            let zeros = vec![0; 1 << 20];
            assert!(bytes.chunks(1 << 20).all(|chunk| chunk == &zeros[..chunk.len()]), "{options:?}");
        }
    }

    #[test]
    fn what_is_no_ext4_is_not_guessed_at() {
        for length in [0, 512, 4096, 1 << 20] {
            assert_eq!(
                allocated(length, |_, bytes| {
                    bytes.fill(0);
                    Ok(())
                })
                .unwrap(),
                None
            );
        }
    }

    proptest! {
        #[test]
        fn garbage_is_survived(seed in prop::collection::vec(any::<u8>(), 1024), length in 2048..1_u64 << 32) {
            let mut superblock = seed.clone();
            superblock[0x38..0x3A].copy_from_slice(&MAGIC.to_le_bytes());
            superblock[0x60..0x68].fill(0);
            superblock[0x18..0x1C].copy_from_slice(&u32::from(seed[0] % 7).to_le_bytes());
            superblock[0x14..0x18].copy_from_slice(&u32::from(seed[1] % 2).to_le_bytes());
            superblock[0x21..0x24].fill(0);
            superblock[0x7..0x8].fill(0);
            let found = allocated(length, |at, bytes| {
                if at == SUPERBLOCK { bytes.copy_from_slice(&superblock) } else { bytes.fill(seed[2]) }
                Ok(())
            });
            if let Some(ranges) = found.unwrap() {
                prop_assert!(ranges.iter().all(|range| range.start < range.end && range.end <= length));
                prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
            }
        }
    }
}
