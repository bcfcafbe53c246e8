use std::path::PathBuf;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixListener,
};

use super::*;

const NO_CONTENT: &str = "HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n";

/// A socket that answers each request with `answer` and keeps what it was sent.
async fn recorded(
    answer: &'static str,
) -> (tempfile::TempDir, Firecracker, SandboxId, tokio::sync::mpsc::UnboundedReceiver<String>) {
    let root = tempfile::tempdir().unwrap();
    let id = SandboxId::random();
    let s: PathBuf = root.path().join(id.as_str()).join("s");
    std::fs::create_dir_all(&s).unwrap();
    let listener = UnixListener::bind(s.join(API)).unwrap();
    let (record, requests) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut seen = Vec::new();
            while !is_whole(&seen) {
                if stream.read_buf(&mut seen).await.unwrap() == 0 {
                    break;
                }
            }
            record.send(String::from_utf8(seen).unwrap()).unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    let client = Firecracker::new(Sockets::new(root.path()));
    (root, client, id, requests)
}

fn is_whole(seen: &[u8]) -> bool {
    let text = String::from_utf8_lossy(seen);
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))
        .map_or(0, |number| number.parse().unwrap());
    body.len() >= length
}

#[tokio::test]
async fn a_load_is_these_bytes() {
    let (_root, client, id, mut requests) = recorded(NO_CONTENT).await;

    client.load(&id).await.unwrap();

    let body = r#"{"enable_diff_snapshots":true,"mem_backend":{"backend_path":"/vm/mem","backend_type":"File"},"resume_vm":true,"snapshot_path":"/vm/state"}"#;
    assert_eq!(
        requests.recv().await.unwrap(),
        format!(
            "PUT /snapshot/load HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
    );
}

#[tokio::test]
async fn a_machine_is_paused_and_resumed() {
    let (_root, client, id, mut requests) = recorded(NO_CONTENT).await;

    client.pause(&id).await.unwrap();
    client.resume(&id).await.unwrap();

    let pause = requests.recv().await.unwrap();
    assert!(
        pause.starts_with("PATCH /vm HTTP/1.1\r\n") && pause.ends_with(r#"{"state":"Paused"}"#),
        "{pause}"
    );
    let resume = requests.recv().await.unwrap();
    assert!(
        resume.starts_with("PATCH /vm HTTP/1.1\r\n") && resume.ends_with(r#"{"state":"Resumed"}"#),
        "{resume}"
    );
}

#[tokio::test]
async fn a_boot_configures_everything_before_it_starts() {
    let (_root, client, id, mut requests) = recorded(NO_CONTENT).await;

    client.boot(&id, Machine { vcpus: 2, memory_mib: 512 }).await.unwrap();
    drop(client);

    let mut seen = Vec::new();
    while let Ok(request) = requests.try_recv() {
        let (line, body) = (
            request.lines().next().unwrap().to_owned(),
            request.split("\r\n\r\n").nth(1).unwrap().to_owned(),
        );
        seen.push((line, serde_json::from_str::<Value>(&body).unwrap()));
    }
    let lines: Vec<_> = seen.iter().map(|(line, _)| line.as_str()).collect();
    assert_eq!(
        lines,
        [
            "PUT /machine-config HTTP/1.1",
            "PUT /boot-source HTTP/1.1",
            "PUT /drives/root HTTP/1.1",
            "PUT /drives/w0 HTTP/1.1",
            "PUT /drives/w1 HTTP/1.1",
            "PUT /drives/w2 HTTP/1.1",
            "PUT /drives/w3 HTTP/1.1",
            "PUT /drives/r0 HTTP/1.1",
            "PUT /drives/r1 HTTP/1.1",
            "PUT /drives/r2 HTTP/1.1",
            "PUT /drives/r3 HTTP/1.1",
            "PUT /network-interfaces/eth0 HTTP/1.1",
            "PUT /vsock HTTP/1.1",
            "PUT /entropy HTTP/1.1",
            "PUT /actions HTTP/1.1",
        ]
    );
    assert_eq!(seen[0].1["track_dirty_pages"], true);
    assert_eq!(seen[0].1["mem_size_mib"], 512);
    for (_, drive) in &seen[2..11] {
        let name = drive["drive_id"].as_str().unwrap();
        assert_eq!(drive["path_on_host"], format!("/vm/{name}.img"));
        assert_eq!(drive["cache_type"], "Writeback");
        assert_eq!(drive["is_read_only"], name.starts_with('r') && name != "root");
        assert_eq!(drive["is_root_device"], false);
        assert_eq!(drive["rate_limiter"], seen[2].1["rate_limiter"]);
    }
    assert_eq!(seen[11].1["host_dev_name"], "tap0");
    assert_eq!(seen[12].1["uds_path"], "/vm/s/v.sock");
    assert_eq!(seen[14].1["action_type"], "InstanceStart");
}

#[tokio::test]
async fn a_capture_pauses_and_writes_a_difference() {
    let (_root, client, id, mut requests) = recorded(NO_CONTENT).await;

    client.capture(&id).await.unwrap();

    let pause = requests.recv().await.unwrap();
    assert!(
        pause.starts_with("PATCH /vm HTTP/1.1\r\n") && pause.ends_with(r#"{"state":"Paused"}"#),
        "{pause}"
    );
    let create = requests.recv().await.unwrap();
    assert!(create.starts_with("PUT /snapshot/create "), "{create}");
    assert!(
        create.ends_with(r#"{"mem_file_path":"/vm/mem","snapshot_path":"/vm/state","snapshot_type":"Diff"}"#),
        "{create}"
    );
}

#[tokio::test]
async fn a_capture_of_a_sandbox_goes_into_files_of_its_own() {
    let (_root, client, id, mut requests) = recorded(NO_CONTENT).await;

    client.pause(&id).await.unwrap();
    client.write_capture(&id, CaptureKind::Full, Memory::Stored).await.unwrap();
    client.resume(&id).await.unwrap();
    client.renew_drive(&id, "r3").await.unwrap();

    let expected = [
        ("PATCH /vm ", r#"{"state":"Paused"}"#),
        (
            "PUT /snapshot/create ",
            r#"{"mem_file_path":"/vm/c.mem","snapshot_path":"/vm/c.state","snapshot_type":"Full"}"#,
        ),
        ("PATCH /vm ", r#"{"state":"Resumed"}"#),
        ("PATCH /drives/r3 ", r#"{"drive_id":"r3","path_on_host":"/vm/r3.img"}"#),
    ];
    for (start, end) in expected {
        let request = requests.recv().await.unwrap();
        assert!(request.starts_with(start) && request.ends_with(end), "{request}");
    }
}

#[tokio::test]
async fn whether_it_is_paused_is_what_it_says_and_nothing_else_is_taken_for_it() {
    for (answer, expected) in [
        ("HTTP/1.1 200 \r\nContent-Length: 18\r\n\r\n{\"state\":\"Paused\"}", Some(true)),
        ("HTTP/1.1 200 \r\nContent-Length: 19\r\n\r\n{\"state\":\"Running\"}", Some(false)),
        ("HTTP/1.1 200 \r\nContent-Length: 23\r\n\r\n{\"state\":\"Not started\"}", None),
        ("HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n[]", None),
    ] {
        let (_root, client, id, _requests) = recorded(answer).await;

        assert_eq!(client.is_paused(&id).await.ok(), expected, "{answer}");
    }
}

#[tokio::test]
async fn a_refusal_brings_its_sentence() {
    let (_root, client, id, _requests) = recorded(
        "HTTP/1.1 400 \r\nContent-Type: application/json\r\nContent-Length: 27\r\n\r\n{\"fault_message\":\"no disk\"}",
    )
    .await;

    let error = client.renew_drive(&id, ROOT).await.unwrap_err();

    assert_eq!(error, Error::Internal("Firecracker answers /drives/root with 400: no disk".into()));
}

#[tokio::test]
async fn an_endless_answer_is_cut() {
    let (_root, client, id, _requests) =
        recorded("HTTP/1.1 200 OK\r\nContent-Length: 10000000\r\n\r\nxxxxxxxx").await;

    let error = client.request(&id, Method::GET, "/", None, Duration::from_millis(500)).await.unwrap_err();

    assert!(matches!(error, FirecrackerError::Nonsense { .. }), "{error:?}");
}

#[tokio::test]
async fn garbage_is_no_answer() {
    let (_root, client, id, _requests) = recorded("SSH-2.0-OpenSSH\r\n\r\n").await;

    let error = client.request(&id, Method::GET, "/", None, Duration::from_secs(2)).await.unwrap_err();

    assert!(matches!(error, FirecrackerError::Nonsense { .. }), "{error:?}");
}

#[tokio::test]
async fn silence_is_late() {
    let (_root, client, id, _requests) = recorded("").await;

    let error = client.request(&id, Method::GET, "/", None, Duration::from_millis(50)).await.unwrap_err();

    assert!(matches!(error, FirecrackerError::Late(_) | FirecrackerError::Nonsense { .. }), "{error:?}");
}

#[test]
fn bakes_are_named_by_the_configuration_that_is_booted() {
    use sha2::{Digest as _, Sha256};
    let all = format!("{:?}", configuration(Machine { vcpus: 2, memory_mib: 512 }));

    let form: String = Sha256::digest(all).iter().take(8).map(|byte| format!("{byte:02x}")).collect();

    assert_eq!(
        pandastack_bus::storage::MACHINE_FORM,
        form,
        "write the new one there, and all is baked again"
    );
}
