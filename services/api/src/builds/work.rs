//! How each stage of a build is done.
//!
//! Owns: which volumes a build gets and what its program is asked. Refuses to know which stage follows (`record`).

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use pandastack_bus::{
    Error,
    storage::{BUILDS, TemplateInfo, TemplateSpec, TemplateState, VolumeUse},
    vmm::SandboxSpec,
};
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::{
    dockerfile,
    guest::{Ended, Fault, Found, Machine, unlogged},
    log::Writer,
    record::{Build, Kind},
    spool::Upload,
    store::Builds,
};
use crate::{
    app::App,
    bus::again,
    problem::{Effect, Problem},
    routes::{templates::resolve, wish::once},
};

/// How long a build may wait for its machine: its template may have to be baked first.
const MACHINE_WAIT: Duration = Duration::from_secs(1800);
/// How long its program may run.
pub const PROGRAM: Duration = Duration::from_secs(1800);
/// The program ends itself, with a sentence of its own; this much later it is ended.
const GRACE: Duration = Duration::from_secs(60);
/// How long the template may take to be baked.
const BAKE: Duration = Duration::from_secs(1800);
/// How long a short command may take, a flush of its disk included.
const SHORT: Duration = Duration::from_secs(300);
/// The machine of a build ends when it was left alone for so long, seconds.
const IDLE: u64 = 900;
const LOOK: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_secs(5);
/// The exit code that says that the tenant's input was wrong.
const WRONG_INPUT: i32 = 65;
/// How long what an earlier run of this daemon asked for may still come: a create goes on without whoever asked.
const STRAGGLERS: Duration = Duration::from_secs(60);

/// A build under way.
#[derive(Debug)]
pub struct Work {
    app: Arc<App>,
    id: String,
    /// Opened when the first line goes into it: to clean up, none is needed.
    log: Option<Writer>,
    sandbox: String,
    /// Part of its volumes' names: a create that an earlier run of this daemon asked for, and that only now gets its turn, must
    /// not find them.
    round: String,
}

/// The volumes of a build, and what they are.
#[derive(Debug, Default)]
struct Ground {
    uses: Vec<VolumeUse>,
    /// Name behind `FROM` and volume.
    templates: BTreeMap<String, String>,
    /// Name behind `FROM` and what such a template brings along.
    envs: BTreeMap<String, BTreeMap<String, String>>,
    /// Name behind the last `FROM`, if the target is a clone of it.
    target_is: Option<String>,
}

/// The templates that a Dockerfile starts from and that this workspace may use, by the name behind `FROM`.
///
/// # Errors
/// 400 when there are too many; storage does not answer.
pub async fn bases(app: &App, workspace: &str, text: &str) -> Result<Vec<(String, TemplateInfo)>, Problem> {
    let mut found = Vec::new();
    for name in dockerfile::bases(text).names {
        if let Some(info) = resolve(&app.storage, workspace, dockerfile::template(&name)).await? {
            found.push((name, info));
        }
        if found.len() > dockerfile::MOST {
            let most = dockerfile::MOST;
            return Err(Problem::invalid(format!("a Dockerfile starts from at most {most} templates"))
                .with("field", "dockerfile"));
        }
    }
    Ok(found)
}

impl Work {
    /// A build that is to go on.
    pub fn new(app: &Arc<App>, id: &str) -> Self {
        let mut round = [0; 4];
        getrandom::fill(&mut round).expect("the kernel's random generator answers");
        let round = format!("{:08x}", u32::from_be_bytes(round));
        Self { app: Arc::clone(app), id: id.to_owned(), log: None, sandbox: String::new(), round }
    }

    fn builds(&self) -> &Builds {
        &self.app.builds
    }

    /// The volume that becomes the template.
    fn target(&self) -> String {
        format!("target-{}", self.round)
    }

    /// A line in the log.
    ///
    /// # Errors
    /// It cannot be written.
    pub async fn note(&mut self, line: &str) -> Result<(), Fault> {
        self.log().await?.note(line).await.map_err(|error| unlogged(&error))?;
        self.builds().grew();
        Ok(())
    }

    async fn log(&mut self) -> Result<&mut Writer, Fault> {
        let log = match self.log.take() {
            Some(log) => log,
            None => Writer::open(&self.app.builds.log(&self.id)).await.map_err(|error| unlogged(&error))?,
        };
        Ok(self.log.insert(log))
    }

    /// Volumes, a machine that has them, and the upload in it.
    ///
    /// # Errors
    /// What stopped it.
    pub async fn make(&mut self, build: &Build) -> Result<(), Fault> {
        self.clean().await?;
        let upload = self.builds().spool.read(&build.id).await;
        let upload = upload.map_err(|error| {
            tracing::error!(build = build.id, %error, "its upload cannot be read");
            Fault::why("what was uploaded cannot be read any more")
        })?;
        self.note("preparing the build machine").await?;
        let ground = self.lay_out(build, &upload).await?;
        self.sandbox = self.machine(build, ground.uses.clone()).await?;
        let app = Arc::clone(&self.app);
        unless_cancelled(&app, &build.id, self.fill(build, &upload, &ground)).await
    }

    /// Makes the volumes: an empty target, or a clone where the result begins as a template does.
    async fn lay_out(&self, build: &Build, upload: &Upload) -> Result<Ground, Fault> {
        let storage = &self.app.storage;
        let text = upload.dockerfile.as_deref().unwrap_or_default();
        let bases =
            bases(&self.app, &build.workspace, text).await.map_err(|problem| Fault::Why(problem.message))?;
        let last = dockerfile::bases(text).last;
        let first = bases.iter().find(|(name, _)| Some(name) == last.as_ref());
        let (workspace, target, size) = (BUILDS.to_owned(), self.target(), build.size_mib);
        let made = match first {
            Some((_, info)) => {
                let template = info.name.clone();
                again(|| storage.clone_template(template.clone(), workspace.clone(), target.clone(), size))
                    .await
            }
            None => again(|| storage.create_volume(workspace.clone(), target.clone(), size)).await,
        };
        made?;
        let mut ground = Ground { target_is: first.map(|(name, _)| name.clone()), ..Ground::default() };
        ground.uses.push(VolumeUse { name: target, read_only: false });
        for (number, (name, info)) in bases.iter().enumerate() {
            let volume = format!("from{number}-{}", self.round);
            let template = info.name.clone();
            again(|| storage.clone_template(template.clone(), workspace.clone(), volume.clone(), 0)).await?;
            ground.uses.push(VolumeUse { name: volume.clone(), read_only: true });
            ground.templates.insert(name.clone(), volume);
            ground.envs.insert(name.clone(), info.env.clone());
        }
        Ok(ground)
    }

    /// A sandbox of the builder's template; waits until there is room and that template is baked.
    async fn machine(&mut self, build: &Build, uses: Vec<VolumeUse>) -> Result<String, Fault> {
        let template = self.builds().workshop.template.clone();
        if let Err(error) = again(|| self.app.storage.template(template.clone())).await {
            return Err(match error {
                Error::NotFound(_) => {
                    Fault::why("this appliance has no template with the program that builds others")
                }
                other => other.into(),
            });
        }
        let spec = SandboxSpec {
            workspace: BUILDS.into(),
            template,
            metadata: [("build".to_owned(), build.id.clone()), ("for".to_owned(), build.workspace.clone())]
                .into(),
            ttl_seconds: IDLE,
            persistent: false,
            // Its template's, which is large and takes what is written.
            disk_mib: 0,
            snapshot: String::new(),
            volumes: uses,
        };
        // One name, so that a lost answer makes no second machine.
        let (request, until) = (once(), Instant::now() + MACHINE_WAIT);
        let mut told = false;
        loop {
            match again(|| self.app.vmm.create(request.clone(), spec.clone())).await {
                Ok(made) => return Ok(made.id),
                Err(
                    error @ (Error::NotReady(_)
                    | Error::NoCapacity(_)
                    | Error::Timeout(_)
                    | Error::GuestUnreachable(_)
                    | Error::Bus(_)),
                ) if Instant::now() < until => {
                    tracing::info!(build = build.id, "waits for its machine: {}", error.message());
                    if !std::mem::replace(&mut told, true) {
                        self.note("waiting for the build machine").await?;
                    }
                    let app = Arc::clone(&self.app);
                    unless_cancelled(&app, &build.id, async {
                        sleep(PAUSE).await;
                        Ok(())
                    })
                    .await?;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Brings the upload and the question into the machine.
    async fn fill(&self, build: &Build, upload: &Upload, ground: &Ground) -> Result<(), Fault> {
        let (machine, workshop) = (self.inside(), &self.builds().workshop);
        let at = |name: &str| format!("{}/{name}", workshop.directory);
        let volume = |name: &str| format!("{}/{name}", workshop.mounts);
        let context = at("context");
        let made = machine.run(&["/bin/mkdir", "-p", &context], SHORT, None).await?;
        if made.code != 0 {
            return Err(Fault::why(format!("the build machine is not as it should be: {}", made.last)));
        }
        for part in &upload.parts {
            let path = match build.kind {
                Kind::Dockerfile => format!("{context}/{}", part.path),
                _ => at("rootfs"),
            };
            let from = self.builds().spool.open(&build.id, part).await.map_err(|error| unlogged(&error))?;
            machine.put(&path, part.size, from).await?;
        }
        if let Some(text) = &upload.dockerfile {
            machine.put(&at("Dockerfile"), text.len() as u64, text.as_bytes()).await?;
        }
        let host = build.image_ref.split('/').next().unwrap_or_default();
        let allowed = self.builds().registries.iter().find(|registry| registry.host == host);
        let (kind, source) = match build.kind {
            Kind::Rootfs => ("rootfs", json!(at("rootfs"))),
            Kind::Dockerfile => ("dockerfile", json!(context)),
            Kind::Reference => ("reference", json!(null)),
        };
        let templates: BTreeMap<_, _> =
            ground.templates.iter().map(|(name, drive)| (name, volume(drive))).collect();
        let mut request = json!({
            "kind": kind, "source": source, "target": volume(&self.target()), "target_is": ground.target_is,
            "templates": templates, "template_env": ground.envs, "seconds": PROGRAM.as_secs(),
        });
        if build.kind == Kind::Dockerfile {
            request["dockerfile"] = json!(at("Dockerfile"));
        }
        if build.kind == Kind::Reference {
            // The operator may have changed the list since.
            let allowed =
                allowed.ok_or_else(|| Fault::why("the image's registry is not allowed any more"))?;
            request["reference"] = json!(build.image_ref);
            request["registry"] = json!({"host": allowed.host, "insecure": allowed.insecure});
        }
        let text = request.to_string();
        machine.put(&at("request.json"), text.len() as u64, text.as_bytes()).await
    }

    /// Runs the program and reads what it found.
    ///
    /// # Errors
    /// What stopped it: for wrong input, the program's own last line.
    pub async fn build(&mut self, build: &Build) -> Result<Found, Fault> {
        self.note("building").await?;
        let app = Arc::clone(&self.app);
        let workshop = app.builds.workshop.clone();
        let (request, result) =
            (format!("{}/request.json", workshop.directory), format!("{}/result.json", workshop.directory));
        let sandbox = self.sandbox.clone();
        let machine = Machine { app: &app, sandbox: &sandbox };
        let argv = [workshop.program.as_str(), &request];
        let run = machine.run(&argv, PROGRAM + GRACE, Some((&app.builds, self.log().await?)));
        match unless_cancelled(&app, &build.id, run).await? {
            Ended { timed_out: true, .. } => {
                Err(Fault::why(format!("the build took over {} minutes", PROGRAM.as_secs() / 60)))
            }
            Ended { code: 0, .. } => machine.result(&result).await,
            Ended { code: WRONG_INPUT, last, .. } if !last.is_empty() => Err(Fault::Why(last)),
            Ended { code, last, .. } if last.is_empty() => {
                Err(Fault::why(format!("the build failed with exit code {code}")))
            }
            Ended { code, last, .. } => {
                Err(Fault::why(format!("the build failed with exit code {code}: {last}")))
            }
        }
    }

    /// Ends the machine and makes its target a template.
    ///
    /// # Errors
    /// What stopped it.
    pub async fn adopt(&mut self, build: &Build) -> Result<(), Fault> {
        let target = format!("{}/{}", self.builds().workshop.mounts, self.target());
        // Written out in place: whoever mounts it read-only cannot replay its journal.
        let script = r#"if grep -q " $0 " /proc/self/mounts; then umount "$0"; fi"#;
        let unmounted = self.inside().run(&["/bin/sh", "-c", script, &target], SHORT, None).await?;
        if unmounted.code != 0 {
            return Err(Fault::why(format!("the root disk could not be finished: {}", unmounted.last)));
        }
        let sandbox = self.sandbox.clone();
        again(|| self.app.vmm.delete(sandbox.clone())).await?;
        self.app.forget(&sandbox);
        let spec = TemplateSpec {
            id: build.template.clone(),
            workspace: build.workspace.clone(),
            title: build.name.clone(),
            vcpus: build.vcpus,
            memory_mib: build.memory_mib,
            env: build.env.clone(),
            workdir: build.workdir.clone(),
        };
        let volume = self.target();
        again(|| self.app.storage.adopt_template(BUILDS.into(), volume.clone(), spec.clone())).await?;
        self.remove_ground().await
    }

    /// Waits until vmm has baked the template.
    ///
    /// # Errors
    /// It cannot be baked.
    pub async fn bake(&mut self, build: &Build) -> Result<(), Fault> {
        self.builds().spool.remove(&build.id);
        self.note("baking the template").await?;
        let app = Arc::clone(&self.app);
        let until = Instant::now() + BAKE;
        let baked = async {
            loop {
                match again(|| app.storage.template(build.template.clone())).await {
                    Ok(info) if info.state == TemplateState::Baked => return Ok(()),
                    Ok(info) if info.state == TemplateState::Failed => {
                        return Err(Fault::why(format!("the template cannot be started: {}", info.reason)));
                    }
                    Ok(_) | Err(Error::Bus(_) | Error::NotReady(_)) if Instant::now() < until => {}
                    Ok(_) => return Err(Fault::why("the template could not be baked in time")),
                    Err(error) => return Err(error.into()),
                }
                sleep(LOOK).await;
            }
        };
        unless_cancelled(&app, &build.id, baked).await
    }

    /// Makes the template its workspace's.
    ///
    /// # Errors
    /// The name is taken by now.
    pub async fn publish(&mut self, build: &Build) -> Result<(), Fault> {
        let published =
            again(|| self.app.storage.publish_template(build.template.clone(), build.replace)).await;
        published?;
        self.app.catalogue.changed();
        self.note("done").await
    }

    /// Removes everything that a build has, but its record and log.
    ///
    /// # Errors
    /// Something stays.
    pub async fn undo(&mut self, build: &Build) -> Result<(), Fault> {
        self.builds().spool.remove(&build.id);
        let (workspace, template) = (build.workspace.clone(), build.template.clone());
        again(|| self.app.storage.delete_template(workspace.clone(), template.clone())).await?;
        self.clean().await
    }

    /// Removes what other builds left: only one is under way, so all of it is nobody's.
    async fn clean(&self) -> Result<(), Fault> {
        self.remove_ground().await?;
        let waited_for = |info: &TemplateInfo| {
            let open = self.builds().list(&info.workspace);
            open.iter().any(|build| build.template == info.name && build.stage.has_template())
        };
        for info in again(|| self.app.storage.templates()).await? {
            if info.hidden && !info.workspace.is_empty() && !waited_for(&info) {
                let (workspace, id) = (info.workspace.clone(), info.name.clone());
                again(|| self.app.storage.delete_template(workspace.clone(), id.clone())).await?;
            }
        }
        Ok(())
    }

    /// Until nothing is there: a create that an earlier run of this daemon asked for may take the volumes only now.
    async fn remove_ground(&self) -> Result<(), Fault> {
        let until = Instant::now() + STRAGGLERS;
        loop {
            match self.remove_once().await {
                Err(Error::WrongState(why)) if Instant::now() < until => {
                    tracing::info!(build = self.id, "not removed yet: {why}");
                    sleep(LOOK).await;
                }
                done => return Ok(done?),
            }
        }
    }

    /// Machines first: they hold the volumes.
    async fn remove_once(&self) -> Result<(), Error> {
        for info in again(|| self.app.vmm.list(BUILDS.into())).await? {
            again(|| self.app.vmm.delete(info.id.clone())).await?;
            self.app.forget(&info.id);
        }
        for info in again(|| self.app.storage.volumes(BUILDS.into())).await? {
            again(|| self.app.storage.delete_volume(BUILDS.into(), info.name.clone())).await?;
        }
        Ok(())
    }

    fn inside(&self) -> Machine<'_> {
        Machine { app: &self.app, sandbox: &self.sandbox }
    }
}

/// Does something unless the owner of a build cancels it meanwhile.
async fn unless_cancelled<T>(
    app: &App,
    id: &str,
    work: impl Future<Output = Result<T, Fault>>,
) -> Result<T, Fault> {
    let cancelled = async {
        let mut changes = app.builds.changes();
        loop {
            if app.builds.is_cancelled(id) || changes.changed().await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        done = work => done,
        () = cancelled => Err(Fault::Cancelled),
    }
}

impl From<Error> for Fault {
    /// What a daemon refused, as the owner of a build is told.
    fn from(error: Error) -> Self {
        tracing::warn!("a build: {}", error.message());
        Self::Why(Problem::from_bus(&error, Effect::Perhaps).message)
    }
}
