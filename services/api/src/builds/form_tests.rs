use proptest::prelude::*;

use super::*;
use crate::builds::spool::Spool;

const BOUNDARY: &str = "multipart/form-data; boundary=b";

/// A form of fields and, with a file name, files.
fn form(parts: &[(&str, Option<&str>, &str)]) -> String {
    let mut text = String::new();
    for (name, file, body) in parts {
        let file = file.map(|file| format!("; filename=\"{file}\"")).unwrap_or_default();
        text += &format!("--b\r\nContent-Disposition: form-data; name=\"{name}\"{file}\r\n\r\n{body}\r\n");
    }
    text + "--b--\r\n"
}

/// What comes of a body that arrives in pieces of `step` bytes; and what stayed in the spool.
async fn asked(
    content_type: &str,
    query: &str,
    body: &[u8],
    step: usize,
) -> (Result<(Wish, Upload), Problem>, u64) {
    let dir = tempfile::tempdir().unwrap();
    let mut incoming = Spool::new(dir.path()).begin("x").await.unwrap();
    let pieces: Vec<_> = body.chunks(step).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
    let mut headers = http::HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, content_type.parse().unwrap());
    let input = Input {
        caller: Default::default(),
        request_id: String::new(),
        query: query.into(),
        headers,
        body: Box::pin(futures_util::stream::iter(pieces)),
    };
    let outcome = read(input, &mut incoming).await;
    (outcome, incoming.length())
}

async fn taken(parts: &[(&str, Option<&str>, &str)]) -> Result<(Wish, Upload), Problem> {
    asked(BOUNDARY, "", form(parts).as_bytes(), 7).await.0
}

#[tokio::test]
async fn every_form_of_the_clients_is_understood() {
    let archive = [("name", None, "mine"), ("size_mb", None, "64"), ("rootfs", Some("x.tar"), "bytes")];
    let (wish, upload) = taken(&archive).await.unwrap();
    assert_eq!((wish.kind, wish.name.as_str(), wish.size_mib), (Kind::Rootfs, "mine", 64));
    assert_eq!((wish.vcpus, wish.memory_mib, wish.replace), (2, 1024, false));
    assert_eq!(upload.parts, [Part { path: "rootfs".into(), offset: 0, size: 5 }]);

    let body = "name=m&image_ref=r.test%2Fa%3A1&size_mb=2048&cpu=64&memory_mb=512&kernel=x&replace=true";
    let (wish, upload) = asked("application/x-www-form-urlencoded", "", body.as_bytes(), 9).await.0.unwrap();
    assert_eq!((wish.kind, wish.vcpus, wish.memory_mib, wish.replace), (Kind::Reference, 8, 512, true));
    assert_eq!((wish.image.unwrap().text.as_str(), upload.parts.len()), ("r.test/a:1", 0));

    // One client names the file by its base name, and a context may have files called as fields are.
    let dockerfile = [
        ("name", None, "m"),
        ("dockerfile", None, "FROM base\n"),
        ("sub/a.txt", Some("a.txt"), "A"),
        ("rootfs", Some("rootfs"), "R"),
        ("./name", Some("name"), ""),
        ("dockerfile", Some("dockerfile"), "D"),
    ];
    let (wish, upload) = taken(&dockerfile).await.unwrap();
    assert_eq!((wish.kind, upload.dockerfile.as_deref()), (Kind::Dockerfile, Some("FROM base\n")));
    let paths: Vec<_> =
        upload.parts.iter().map(|part| (part.path.as_str(), part.offset, part.size)).collect();
    assert_eq!(paths, [("sub/a.txt", 0, 1), ("rootfs", 1, 1), ("name", 2, 0), ("dockerfile", 2, 1)]);

    let overwritten = [("name", None, "m"), ("dockerfile", Some("dockerfile"), "FROM base")];
    let (_, upload) = taken(&overwritten).await.unwrap();
    assert_eq!(upload.dockerfile.as_deref(), Some("FROM base"));
    let asked = asked(BOUNDARY, "replace=1", form(&archive).as_bytes(), 1000).await.0.unwrap().0;
    assert!(asked.replace);
}

#[tokio::test]
async fn a_wrong_form_is_refused_with_a_sentence() {
    let name = ("name", None, "m");
    let image = ("image_ref", None, "r.test/a");
    for (parts, status, word) in [
        (vec![name], 400, "required"),
        (vec![image], 400, "name"),
        (vec![("name", None, ".."), image], 400, "name"),
        (vec![("name", None, "builds"), image], 400, "name"),
        (vec![name, name, image], 400, "twice"),
        (vec![name, image, ("size_mb", None, "16385")], 400, "size_mb"),
        (vec![name, image, ("size_mb", None, "+64")], 400, "size_mb"),
        (vec![name, image, ("cpu", None, "0")], 400, "cpu"),
        (vec![name, image, ("memory_mb", None, "127")], 400, "memory_mb"),
        (vec![name, image, ("replace", None, "perhaps")], 400, "replace"),
        (vec![name, ("image_ref", None, "r.test/..")], 400, "image_ref"),
        (vec![name, image, ("dockerfile", None, "FROM base")], 400, "exclude"),
        (vec![name, image, ("rootfs", Some("x"), "x")], 400, "exclude"),
        (vec![name, ("rootfs", Some("x"), "x"), ("a", Some("a"), "x")], 400, "required"),
        (vec![name, ("dockerfile", None, "F"), ("../a", Some("a"), "x")], 400, ".."),
        (vec![name, ("dockerfile", None, "F"), ("/etc/a", Some("a"), "x")], 400, "relative"),
        (vec![name, ("dockerfile", None, "F"), ("a//b", Some("a"), "x")], 400, "empty"),
        (vec![name, ("dockerfile", None, "F"), ("", Some("a"), "x")], 400, "empty"),
        (vec![name, ("dockerfile", None, "F"), ("a", Some("a"), "x"), ("./a", Some("a"), "x")], 400, "twice"),
        (vec![name, ("dockerfile", None, "F"), ("a/b", Some("a"), "x"), ("a", Some("a"), "x")], 400, "both"),
        (vec![("name", None, &"x".repeat(5000))], 413, "KiB"),
        (vec![name, ("dockerfile", None, &"x".repeat(DOCKERFILE + 1))], 413, "KiB"),
    ] {
        let problem = taken(&parts).await.unwrap_err();
        assert_eq!(problem.status.as_u16(), status, "{parts:?}: {}", problem.message);
        assert!(problem.message.contains(word), "{parts:?}: {}", problem.message);
    }
    for (content_type, body) in [
        ("application/json", "{}"),
        ("multipart/form-data", ""),
        (BOUNDARY, "--b\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\ncut"),
        (BOUNDARY, "nothing of the kind"),
        ("application/x-www-form-urlencoded", "name=%ff"),
    ] {
        let problem = asked(content_type, "", body.as_bytes(), 5).await.0.unwrap_err();
        assert_eq!(problem.status.as_u16(), 400, "{content_type}: {}", problem.message);
    }
}

#[tokio::test]
async fn what_is_too_large_is_cut_off_early() {
    let large = "x".repeat((32 << 20) + (4 << 20));
    let parts = form(&[("name", None, "m"), ("size_mb", None, "32"), ("rootfs", Some("x"), &large)]);
    let (outcome, kept) = asked(BOUNDARY, "", parts.as_bytes(), 64 << 10).await;
    assert_eq!(outcome.unwrap_err().status.as_u16(), 413);
    assert!(kept <= 32 << 20);

    let large = "x".repeat(CONTEXT as usize + 1);
    let parts = form(&[("name", None, "m"), ("dockerfile", None, "F"), ("a", Some("a"), &large)]);
    let (outcome, kept) = asked(BOUNDARY, "", parts.as_bytes(), 64 << 10).await;
    assert_eq!(outcome.unwrap_err().status.as_u16(), 413);
    assert!(kept <= CONTEXT);

    let names: Vec<String> = (0..=FILES).map(|number| number.to_string()).collect();
    let mut parts = vec![("name", None, "m"), ("dockerfile", None, "F")];
    parts.extend(names.iter().map(|name| (name.as_str(), Some("f"), "")));
    assert_eq!(asked(BOUNDARY, "", form(&parts).as_bytes(), 9999).await.0.unwrap_err().status.as_u16(), 413);

    // A header that does not end is not collected for ever.
    let endless = format!("--b\r\nContent-Disposition: form-data; name=\"{}", "x".repeat(3 * AHEAD));
    assert_eq!(asked(BOUNDARY, "", endless.as_bytes(), 64 << 10).await.0.unwrap_err().status.as_u16(), 400);
}

proptest! {
    #[test]
    fn a_path_stays_below_where_it_is_put(name in "[a./\\\\ é\u{1}]{0,20}") {
        if let Ok(path) = relative(&name) {
            let below = std::path::Path::new("/c").join(&path);
            prop_assert!(below.starts_with("/c") && below != std::path::Path::new("/c"));
            prop_assert!(below.components().all(|part| !matches!(part, std::path::Component::ParentDir)));
            prop_assert_eq!(relative(&path).unwrap(), path);
        }
    }

    #[test]
    fn no_body_panics(bytes in prop::collection::vec(any::<u8>(), 0..200), step in 1..50_usize) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let body = [b"--b\r\nContent-Disposition: form-data; name=\"a\"; filename=\"", bytes.as_slice()].concat();
        for body in [&bytes, &body] {
            let _ = runtime.block_on(asked(BOUNDARY, "", body, step));
            let _ = runtime.block_on(asked("application/x-www-form-urlencoded", "", body, step));
        }
    }
}
