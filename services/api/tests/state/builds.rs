//! Templates of workspaces: built, followed, used, replaced, deleted; with the real agent as the build machine and a script as
//! its program.

use std::{os::unix::fs::PermissionsExt, sync::atomic::Ordering, time::Duration};

use pandastack_bus::{Error, storage::BUILDS};
use serde_json::{Value, json};

use crate::{
    client::{Api, Reply},
    common::Appliance,
};

const FORM: (&str, &str) = ("content-type", "application/x-www-form-urlencoded");
const MULTIPART: (&str, &str) = ("content-type", "multipart/form-data; boundary=b");

/// A program that shows its request and its files, and finds an environment.
const GOOD: &str = r#"cat "$1"; echo; echo "{\"error\":\"x\"}"; echo end
cd "$(dirname "$1")"; find . -type f | sort; cat context/sub/a.txt rootfs 2>/dev/null
echo '{"env":{"A":"B"},"workdir":"/srv","bytes":4096}' > result.json"#;

fn form(parts: &[(&str, Option<&str>, &str)]) -> Vec<u8> {
    let mut text = String::new();
    for (name, file, body) in parts {
        let file = file.map(|file| format!("; filename=\"{file}\"")).unwrap_or_default();
        text += &format!("--b\r\nContent-Disposition: form-data; name=\"{name}\"{file}\r\n\r\n{body}\r\n");
    }
    (text + "--b--\r\n").into_bytes()
}

/// The program of the build machine.
fn program(appliance: &Appliance, script: &str) {
    let path = appliance.state.path().join("build");
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

async fn build(api: &Api, fields: &str) -> Reply {
    api.send("POST", "/v1/templates/build", &[FORM], fields.as_bytes()).await
}

async fn ended(api: &Api, build: &Value) -> Value {
    let path = format!("/v1/templates/builds/{}", build["id"].as_str().unwrap());
    for _ in 0..600 {
        let now = api.get(&path).await.json();
        let status = now["status"].as_str().unwrap();
        if (status == "done" || status == "failed") && now["ended_at"].is_string() {
            return now;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("it never ends: {}", api.get(&path).await.text());
}

async fn log(api: &Api, build: &Value, query: &str) -> String {
    api.get(&format!("/v1/templates/builds/{}/logs{query}", build["id"].as_str().unwrap())).await.text()
}

/// Nothing of a build is left but templates.
async fn tidy(appliance: &Appliance) {
    let left = || {
        let machines = appliance.vmm.sandboxes.lock().unwrap().values().any(|info| info.workspace == BUILDS);
        let volumes =
            appliance.shelf.volumes.lock().unwrap().keys().any(|(workspace, _)| workspace == BUILDS);
        let hidden = appliance.shelf.templates.lock().unwrap().values().any(|info| info.hidden);
        let spool = std::fs::read_dir(appliance.state.path().join("builds/spool")).unwrap().count() > 0;
        (machines, volumes, hidden, spool)
    };
    for _ in 0..400 {
        if left() == (false, false, false, false) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("left over: {:?}", left());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dockerfile_becomes_a_template_of_its_workspace() {
    let appliance = Appliance::start().await;
    program(&appliance, GOOD);
    let api = Api::new(&appliance);
    let parts = form(&[
        ("name", None, "mine"),
        ("size_mb", None, "2048"),
        ("memory_mb", None, "512"),
        ("dockerfile", None, "FROM python AS one\nFROM ubuntu-24.04:latest\nCOPY sub /sub\n"),
        ("sub/a.txt", Some("a.txt"), "the file\n"),
    ]);

    let made = api.send("POST", "/v1/templates/build", &[MULTIPART], &parts).await;

    let made_json = made.json();
    assert_eq!(made.status, 202, "{made_json}");
    assert_eq!((&made_json["name"], &made_json["size_mb"]), (&json!("mine"), &json!(2048)));
    let followed = log(&api, &made_json, "?follow=1").await;
    let done = ended(&api, &made_json).await;
    assert_eq!((&done["status"], &done["bytes"]), (&json!("done"), &json!(4096)), "{done}\n{followed}");
    assert!(followed.ends_with("event: done\ndata: end\n\n"), "{followed}");
    for line in [
        "data: | {\"error\":\"x\"}\n",
        "data: | end\n",
        "data: ./Dockerfile\n",
        "data: ./context/sub/a.txt\n",
        "data: the file\n",
        "data: ==> baking the template\n",
        "\"target_is\":\"ubuntu-24.04:latest\"",
        "\"kind\":\"dockerfile\"",
    ] {
        assert!(followed.contains(line), "{line} in {followed}");
    }
    let mounts = appliance.state.path().join("mnt");
    for (name, volume) in [("python", "from0"), ("ubuntu-24.04:latest", "from1")] {
        assert!(followed.contains(&format!("\"{name}\":\"{}/{volume}-", mounts.display())), "{followed}");
    }
    assert_eq!(log(&api, &made_json, "").await, followed);
    tidy(&appliance).await;
    // The last `FROM` made the target a clone, which is never smaller than what it is of.
    let template = api.get("/v1/templates/mine").await.json();
    assert_eq!((&template["disk_mb"], &template["memory_mb"]), (&json!(4096), &json!(512)));
    assert_eq!((&template["is_global"], &template["workspace"]), (&json!(false), &json!("default")));
    assert_eq!(template["meta"]["workdir"], "/srv");

    let names = |list: Value| -> Vec<String> {
        list.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
    };
    let listed = api.get("/v1/templates").await.json();
    assert_eq!(names(listed), ["base", "code-interpreter", "mine"]);
    let sandbox = api.post("/v1/sandboxes", &json!({"template": "mine"})).await;
    assert_eq!(sandbox.status, 201, "{}", sandbox.text());
    assert_eq!(names(api.get("/v1/templates/builds").await.json()), ["mine"]);

    let (token, _) = appliance.other_workspace().await;
    let theirs = Api::with_token(&appliance, &token);
    let id = made_json["id"].as_str().unwrap();
    for path in [
        "/v1/templates/mine".to_owned(),
        format!("/v1/templates/builds/{id}"),
        format!("/v1/templates/builds/{id}/logs?follow=1"),
    ] {
        assert_eq!(theirs.get(&path).await.status, 404, "{path}");
    }
    assert_eq!(theirs.post(&format!("/v1/templates/builds/{id}/cancel"), &json!({})).await.status, 404);
    assert_eq!(theirs.send("DELETE", "/v1/templates/mine", &[], b"").await.status, 404);
    assert_eq!(theirs.post("/v1/sandboxes", &json!({"template": "mine"})).await.status, 400);
    assert_eq!(names(theirs.get("/v1/templates").await.json()), ["base", "code-interpreter"]);
    assert_eq!(theirs.get("/v1/templates/builds").await.json(), json!([]));
    for status in [204, 404] {
        assert_eq!(api.send("DELETE", "/v1/templates/mine", &[], b"").await.status, status);
    }
    let shipped = api.send("DELETE", "/v1/templates/ubuntu-24.04", &[], b"").await;
    assert_eq!(
        (shipped.status, &shipped.json()["error"]),
        (403, &json!("global templates cannot be deleted"))
    );
    assert_eq!(api.post("/v1/sandboxes", &json!({"template": "mine"})).await.status, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_and_an_allowed_image_are_handed_on() {
    let appliance = Appliance::start().await;
    program(&appliance, GOOD);
    let api = Api::new(&appliance);
    let parts =
        form(&[("name", None, "one"), ("size_mb", None, "64"), ("rootfs", Some("x.tar"), "the archive\n")]);
    let made = api.send("POST", "/v1/templates/build", &[MULTIPART], &parts).await.json();
    assert_eq!(ended(&api, &made).await["status"], "done");
    let told = log(&api, &made, "").await;
    assert!(told.contains("\"kind\":\"rootfs\"") && told.contains("data: the archive\n"), "{told}");

    let made = build(&api, "name=two&image_ref=registry.test:5000/a/b:1&size_mb=64").await;
    assert_eq!((made.status, &made.json()["image_ref"]), (202, &json!("registry.test:5000/a/b:1")));
    assert_eq!(ended(&api, &made.json()).await["status"], "done");
    let told = log(&api, &made.json(), "").await;
    assert!(told.contains("\"registry\":{\"host\":\"registry.test:5000\",\"insecure\":true}"), "{told}");
    let refused = build(&api, "name=three&image_ref=debian").await;
    assert_eq!(refused.status, 400);
    assert!(refused.json()["error"].as_str().unwrap().contains("docker.io"), "{}", refused.text());
    tidy(&appliance).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_says_why_and_leaves_nothing() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    for (script, error) in [
        ("exec 2>&1; echo why >&2; echo 'the Dockerfile is wrong'; exit 65", "the Dockerfile is wrong"),
        ("echo broken; exit 3", "the build failed with exit code 3: broken"),
        ("exit 0", "the build machine refused"),
        ("echo '{\"workdir\":\"x\"}' > \"$(dirname \"$1\")/result.json\"", "working directory"),
    ] {
        program(&appliance, script);
        let made = build(&api, "name=mine&dockerfile=FROM+base&size_mb=64").await.json();
        let failed = ended(&api, &made).await;
        assert_eq!(failed["status"], "failed");
        assert!(failed["error"].as_str().unwrap().contains(error), "{script}: {failed}");
        assert!(log(&api, &made, "").await.contains(error), "{script}");
        let _ = std::fs::remove_dir_all(appliance.state.path().join("work"));
    }
    program(&appliance, GOOD);
    *appliance.shelf.bake_failure.lock().unwrap() = Some("no init".into());
    let made = build(&api, "name=mine&dockerfile=FROM+base").await.json();
    let failed = ended(&api, &made).await;
    assert_eq!(failed["error"], "the template cannot be started: no init");
    tidy(&appliance).await;
    assert_eq!(api.get("/v1/templates/mine").await.status, 404);
    *appliance.shelf.bake_failure.lock().unwrap() = None;
    appliance.vmm.failures.lock().unwrap().push(Error::InvalidArgument("no such template".into()));
    let made = build(&api, "name=mine&dockerfile=FROM+base").await.json();
    assert_eq!(ended(&api, &made).await["status"], "failed");
    tidy(&appliance).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_build_is_cancelled_waiting_or_running() {
    let appliance = Appliance::start().await;
    program(&appliance, "echo begun; sleep 60");
    let api = Api::new(&appliance);
    let running = build(&api, "name=one&dockerfile=FROM+base").await.json();
    let waiting = build(&api, "name=two&dockerfile=FROM+base").await.json();
    let cancel = async |build: &Value| {
        api.post(&format!("/v1/templates/builds/{}/cancel", build["id"].as_str().unwrap()), &json!({})).await
    };
    let cancelled = cancel(&waiting).await;
    assert_eq!((cancelled.status, &cancelled.json()["status"]), (200, &json!("failed")));
    for _ in 0..400 {
        if log(&api, &running, "").await.contains("begun") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    assert_eq!(cancel(&running).await.status, 200);
    let ended_now = ended(&api, &running).await;
    assert_eq!((&ended_now["status"], &ended_now["error"]), (&json!("failed"), &json!("cancelled")));
    assert_eq!(cancel(&running).await.status, 409);
    tidy(&appliance).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_are_taken_and_too_many_builds_are_refused() {
    let appliance = Appliance::start().await;
    program(&appliance, GOOD);
    let api = Api::new(&appliance);
    for (fields, status) in [
        ("name=base&dockerfile=FROM+base", 409),
        ("name=ubuntu-24.04&dockerfile=FROM+base&replace=true", 403),
        ("name=..&dockerfile=FROM+base", 400),
        ("name=builds&dockerfile=FROM+base", 400),
        ("name=x", 400),
        ("name=x&dockerfile=FROM+base&memory_mb=65537", 400),
        ("name=x&dockerfile=FROM+a", 202),
    ] {
        let reply = build(&api, fields).await;
        assert_eq!(reply.status, status, "{fields}: {}", reply.text());
    }
    let all = api.get("/v1/templates/builds").await.json();
    ended(&api, &all[0]).await;
    let first = build(&api, "name=mine&dockerfile=FROM+base").await.json();
    assert_eq!(ended(&api, &first).await["status"], "done");
    let taken = build(&api, "name=mine&dockerfile=FROM+base").await;
    assert_eq!(
        (taken.status, &taken.json()["error"]),
        (409, &json!("template already exists; pass replace=true to overwrite"))
    );
    let path = "/v1/templates/build?replace=true";
    let second = api.send("POST", path, &[FORM], b"name=mine&dockerfile=FROM+base&cpu=3").await;
    assert_eq!(ended(&api, &second.json()).await["status"], "done");
    assert_eq!(api.get("/v1/templates/mine").await.json()["cpu"], 3);

    program(&appliance, "sleep 60");
    let many: Vec<u16> = {
        let mut all = Vec::new();
        for number in 0..5 {
            all.push(build(&api, &format!("name=m{number}&dockerfile=FROM+base")).await.status);
        }
        all
    };
    assert_eq!(many, [202, 202, 202, 202, 429]);
    let refused = build(&api, "name=m9&dockerfile=FROM+base").await;
    assert!(refused.header("retry-after").is_some());
    let operator = pandastack_api::operator::Operator::new(&appliance.app);
    let busy = pandastack_bus::api::ApiBackend::delete_workspace(&operator, "default".into()).await;
    assert!(
        matches!(busy, Err(Error::WrongState(text)) if text.contains("2 templates") && text.contains("builds"))
    );
    appliance.shelf.full.store(true, Ordering::Relaxed);
    let (token, _) = appliance.other_workspace().await;
    let full = build(&Api::with_token(&appliance, &token), "name=x&dockerfile=FROM+base").await;
    assert_eq!(full.status, 507, "{}", full.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_uploads_are_refused_and_leave_nothing() {
    let appliance = Appliance::start().await;
    let api = Api::new(&appliance);
    for name in ["../x", "/etc/x", "a/../../x", "a//b", ""] {
        let parts = form(&[("name", None, "m"), ("dockerfile", None, "FROM base"), (name, Some("x"), "x")]);
        let reply = api.send("POST", "/v1/templates/build", &[MULTIPART], &parts).await;
        assert_eq!(reply.status, 400, "{name:?}: {}", reply.text());
    }
    let four = "FROM%20python%0AFROM%20base%0AFROM%20ubuntu-24.04%0AFROM%20code-interpreter";
    let refused = build(&api, &format!("name=m&dockerfile={four}")).await;
    assert_eq!(refused.status, 400, "{}", refused.text());
    assert_eq!(api.get("/v1/templates/builds").await.json(), json!([]));
    tidy(&appliance).await;
}
