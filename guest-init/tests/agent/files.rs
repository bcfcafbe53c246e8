//! Files: written whole, read back, listed, deleted.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use pandastack_protocol::*;
use tokio::net::UnixStream;

use crate::world::*;

async fn put(
    client: &mut Client<UnixStream>,
    path: &str,
    bytes: &[u8],
    mode: u32,
) -> Result<Written, ClientError> {
    client.write_file(path, bytes.len() as u64, mode, LIMIT).await?;
    client.write_chunk(bytes, LIMIT).await?;
    client.write_end(LIMIT).await
}

async fn get(client: &mut Client<UnixStream>, path: &str) -> Result<Vec<u8>, ClientError> {
    client.read_file(path, LIMIT).await?;
    let mut all = Vec::new();
    while let Some(bytes) = client.read_chunk(LIMIT).await? {
        all.extend_from_slice(&bytes);
    }
    Ok(all)
}

fn leftovers(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).expect("a directory").flatten();
    names
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with(".panda"))
        .collect()
}

#[tokio::test]
async fn files_come_back_as_they_were_written() {
    let world = World::new();
    let mut client = world.client().await;
    let path = world.path("a/b/c.bin");
    let bytes: Vec<u8> = (0..3_000_001u32).map(|i| (i % 253) as u8).collect();
    assert_eq!(put(&mut client, &path, &bytes, 0o640).await.expect("written"), Written { bytes: 3_000_001 });
    assert_eq!(fs::metadata(&path).expect("it is there").mode() & 0o7777, 0o640);
    assert_eq!(fs::metadata(world.path("a/b")).expect("it is there").mode() & 0o7777, 0o755);
    assert!(get(&mut client, &path).await.expect("read") == bytes);
    // An existing file keeps its mode and owner.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("chmod");
    std::os::unix::fs::chown(&path, Some(1234), Some(1235)).expect("chown");
    put(&mut client, &path, b"short", 0o777).await.expect("written");
    let metadata = fs::metadata(&path).expect("it is there");
    assert_eq!(
        (metadata.mode() & 0o7777, metadata.uid(), metadata.gid(), metadata.len()),
        (0o600, 1234, 1235, 5)
    );
    // Empty ones, and ones without a size, are files, too.
    put(&mut client, &world.path("empty"), b"", 0o644).await.expect("written");
    assert_eq!(get(&mut client, &world.path("empty")).await.expect("read"), b"");
    assert!(!get(&mut client, "/proc/self/status").await.expect("read").is_empty());
    assert_eq!(leftovers(world.dir.path()), Vec::<String>::new());
}

#[tokio::test]
async fn links_are_written_through() {
    let world = World::new();
    let mut client = world.client().await;
    fs::create_dir(world.path("d")).expect("mkdir");
    symlink("d/target", world.path("link")).expect("symlink");
    put(&mut client, &world.path("link"), b"one", 0o644).await.expect("written");
    assert!(fs::symlink_metadata(world.path("link")).expect("there").is_symlink());
    assert_eq!(fs::read(world.path("d/target")).expect("there"), b"one");
    put(&mut client, &world.path("link"), b"two", 0o644).await.expect("written");
    assert_eq!(fs::read(world.path("d/target")).expect("there"), b"two");
    symlink("loop", world.path("loop")).expect("symlink");
    assert_eq!(code(put(&mut client, &world.path("loop"), b"x", 0o644).await), Code::Invalid);
}

#[tokio::test]
async fn a_write_is_whole_or_not_at_all() {
    let world = World::new();
    let path = world.path("file");
    fs::write(&path, "old").expect("written");
    let unchanged = || {
        assert_eq!(fs::read_to_string(&path).expect("there"), "old");
        assert_eq!(leftovers(world.dir.path()), Vec::<String>::new());
    };
    let mut client = world.client().await;
    // Fewer bytes than announced.
    client.write_file(&path, 10, 0o644, LIMIT).await.expect("ready");
    client.write_chunk(b"12345", LIMIT).await.expect("sent");
    assert_eq!(code(client.write_end(LIMIT).await), Code::Invalid);
    unchanged();
    // More, and far more, than announced; the connection goes on.
    for length in [11, 3_000_000] {
        client.write_file(&path, 10, 0o644, LIMIT).await.expect("ready");
        client.write_chunk(&vec![0; length], LIMIT).await.expect("sent");
        assert_eq!(code(client.write_end(LIMIT).await), Code::Invalid);
        unchanged();
    }
    // No room: refused before a byte is sent.
    assert_eq!(code(client.write_file(&path, 1 << 55, 0o644, LIMIT).await), Code::NoSpace);
    assert_eq!(code(client.write_file(&path, u64::MAX, 0o644, LIMIT).await), Code::NoSpace);
    unchanged();
    // A host that goes away.
    client.write_file(&path, 1_000_000, 0o644, LIMIT).await.expect("ready");
    client.write_chunk(&[0; 600_000], LIMIT).await.expect("sent");
    assert_eq!(leftovers(world.dir.path()).len(), 1);
    drop(client);
    until("tidying up", || leftovers(world.dir.path()).is_empty()).await;
    unchanged();
}

#[tokio::test]
async fn wrong_paths_are_told_apart() {
    let world = World::new();
    let mut client = world.client().await;
    fs::write(world.path("file"), "x").expect("written");
    fs::create_dir(world.path("dir")).expect("mkdir");
    nix::unistd::mkfifo(Path::new(&world.path("fifo")), nix::sys::stat::Mode::S_IRWXU).expect("mkfifo");
    let _socket = std::os::unix::net::UnixListener::bind(world.path("socket")).expect("bind");
    let below_file = world.path("file/x");
    assert_eq!(code(get(&mut client, &world.path("none")).await), Code::NotFound);
    assert_eq!(code(get(&mut client, &world.path("dir")).await), Code::IsADirectory);
    assert_eq!(code(get(&mut client, &below_file).await), Code::NotADirectory);
    for node in ["fifo", "socket"] {
        assert_eq!(code(get(&mut client, &world.path(node)).await), Code::Invalid, "{node}");
        assert_eq!(code(put(&mut client, &world.path(node), b"x", 0o644).await), Code::Invalid, "{node}");
    }
    assert_eq!(code(get(&mut client, "/dev/zero").await), Code::Invalid);
    assert_eq!(code(get(&mut client, "relative").await), Code::Invalid);
    assert_eq!(code(get(&mut client, "/a\0b").await), Code::Invalid);
    assert_eq!(code(put(&mut client, &world.path("dir"), b"x", 0o644).await), Code::IsADirectory);
    assert_eq!(code(put(&mut client, &world.path("new/"), b"x", 0o644).await), Code::IsADirectory);
    assert_eq!(code(put(&mut client, "/", b"x", 0o644).await), Code::IsADirectory);
    assert_eq!(code(put(&mut client, &below_file, b"x", 0o644).await), Code::NotADirectory);
    assert_eq!(code(put(&mut client, &world.path("file/x/y"), b"x", 0o644).await), Code::NotADirectory);
    client.list(&world.path("file"), LIMIT).await.expect("sent");
    assert_eq!(code(client.next_entries(LIMIT).await), Code::NotADirectory);
    client.list(&world.path("none"), LIMIT).await.expect("sent");
    assert_eq!(code(client.next_entries(LIMIT).await), Code::NotFound);
    let stat = |path: &str| Request::Stat { path: path.to_owned() };
    assert_eq!(code(client.call::<Entry>(&stat(&world.path("none")), LIMIT).await), Code::NotFound);
    let entry: Entry = client.call(&stat(&world.path("fifo")), LIMIT).await.expect("stat");
    assert_eq!((entry.kind, entry.name.as_str()), ('p', "fifo"));
    let root: Entry = client.call(&stat("/"), LIMIT).await.expect("stat");
    assert_eq!((root.kind, root.name.as_str()), ('d', "/"));
}

#[tokio::test]
async fn listings_are_sorted_complete_and_cut_into_frames() {
    let world = World::new();
    let mut client = world.client().await;
    let dir = world.path("many");
    fs::create_dir(&dir).expect("mkdir");
    for i in 0..3000 {
        fs::write(format!("{dir}/{i:05}"), "").expect("written");
    }
    symlink("/", format!("{dir}/zlink")).expect("symlink");
    use std::os::unix::ffi::OsStrExt;
    fs::write(Path::new(&dir).join(std::ffi::OsStr::from_bytes(b"z\xff")), "abc").expect("written");
    client.list(&dir, LIMIT).await.expect("sent");
    let mut all = Vec::new();
    let mut frames = 0;
    while let Some(entries) = client.next_entries(LIMIT).await.expect("entries") {
        frames += 1;
        all.extend(entries);
    }
    assert!(frames > 5);
    assert_eq!(all.len(), 3002);
    assert!(all.windows(2).all(|pair| pair[0].name < pair[1].name));
    let last = &all[3000..];
    assert_eq!((last[0].name.as_str(), last[0].kind), ("zlink", 'l'));
    assert_eq!((last[1].name.as_str(), last[1].kind, last[1].size), ("z\u{fffd}", 'f', 3));
}

#[tokio::test]
async fn deleting_stays_inside() {
    let world = World::new();
    let mut client = world.client().await;
    let delete = |path: String| Request::Delete { path };
    let outside = world.path("outside");
    fs::create_dir(&outside).expect("mkdir");
    fs::write(format!("{outside}/keep"), "x").expect("written");
    let tree = world.path("tree");
    // Deeper than any number of open directories, and wide.
    let mut deep = PathBuf::from(&tree);
    for _ in 0..120 {
        deep.push("d");
    }
    fs::create_dir_all(&deep).expect("mkdir");
    fs::write(deep.join("leaf"), "x").expect("written");
    symlink(&outside, format!("{tree}/link")).expect("symlink");
    for i in 0..3000 {
        fs::write(format!("{tree}/{i}"), "").expect("written");
    }
    let () = client.call(&delete(tree.clone()), LIMIT).await.expect("deleted");
    assert!(!Path::new(&tree).exists());
    assert_eq!(fs::read_to_string(format!("{outside}/keep")).expect("it stays"), "x");
    // A link itself, not what it leads to.
    symlink(&outside, world.path("link")).expect("symlink");
    let () = client.call(&delete(world.path("link")), LIMIT).await.expect("deleted");
    assert!(Path::new(&outside).exists() && !Path::new(&world.path("link")).exists());
    assert_eq!(code(client.call::<()>(&delete(tree), LIMIT).await), Code::NotFound);
    for path in ["/", "//", "/tmp/..", "/.", "relative"] {
        assert_eq!(code(client.call::<()>(&delete(path.into()), LIMIT).await), Code::Invalid, "{path}");
    }
    for path in ["/proc", "/tmp/../sys", "/proc/sys/kernel/hostname"] {
        assert_eq!(code(client.call::<()>(&delete(path.into()), LIMIT).await), Code::Denied, "{path}");
    }
}
