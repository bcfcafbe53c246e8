//! Does the model's requests to a real appliance and compares after each.
//!
//! Owns: which id each of the model's names has. Refuses to know: what a request should do; the model says it.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::model::{Action, Contents, Handle, Outcome, Random, World};
use crate::api::{Answer, Api, ids};

/// Makes the guest's half of the model: two directories, and a process whose life shows that memory went on.
const FURNISH: &str = "mkdir -p /root/model /dev/shm/model; setsid sleep 1000000 >/dev/null 2>&1 </dev/null & \
                       echo $! > /dev/shm/model.pid";
/// What a guest has, from the disk and not from its page cache.
const READ: &str = "sync; echo 3 > /proc/sys/vm/drop_caches; \
                    for f in /root/model/*; do [ -e $f ] && echo disk ${f##*/} $(cat $f); done; \
                    for f in /dev/shm/model/*; do [ -e $f ] && echo memory ${f##*/} $(cat $f); done; \
                    kill -0 $(cat /dev/shm/model.pid) && echo alive; echo machine $(cat /etc/machine-id)";

/// A run of the model against an appliance.
#[derive(Debug)]
pub struct Driver<'a> {
    api: &'a Api,
    seed: u64,
    world: World,
    random: Random,
    /// Ids of sandboxes and snapshots.
    ids: BTreeMap<Handle, String>,
    /// The machine-id of each sandbox that was read: stays, and is nobody else's.
    machines: BTreeMap<Handle, String>,
    /// Requests so far.
    pub steps: u64,
    /// Of these, rightly refused.
    pub refused: u64,
}

impl<'a> Driver<'a> {
    /// A run over an empty workspace: everything in it is deleted.
    ///
    /// # Errors
    /// When the API does not answer.
    pub fn new(api: &'a Api, seed: u64) -> Result<Self> {
        api.delete_all()?;
        Ok(Self {
            api,
            seed,
            world: World::default(),
            random: Random::new(seed),
            ids: BTreeMap::new(),
            machines: BTreeMap::new(),
            steps: 0,
            refused: 0,
        })
    }

    /// So many requests, or fewer when the time is over.
    ///
    /// # Errors
    /// The first divergence, with seed, step and request.
    pub fn run(&mut self, steps: u64, within: Duration) -> Result<()> {
        let deadline = Instant::now() + within;
        for _ in 0..steps {
            if Instant::now() > deadline {
                break;
            }
            let action = self.world.choose(&mut self.random);
            self.steps += 1;
            self.step(&action)
                .and_then(|()| self.compare())
                .with_context(|| format!("seed {}, step {}: {action:?}", self.seed, self.steps))?;
        }
        Ok(())
    }

    /// Reads every sandbox, awake or not, then deletes everything.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn finish(&mut self) -> Result<()> {
        let all: Vec<Handle> = self.world.sandboxes().keys().copied().collect();
        for at in all {
            for action in [Action::Resume { at }, Action::Read { at }] {
                self.step(&action).with_context(|| format!("seed {}, the end: {action:?}", self.seed))?;
            }
        }
        self.api.delete_all()
    }

    fn step(&mut self, action: &Action) -> Result<()> {
        let outcome = self.world.step(action);
        let answer = self.ask(action)?;
        let Outcome::Done { made, gone } = outcome else {
            self.refused += 1;
            ensure!(answer.status == 409 && answer.body["error"].is_string(), "409 was expected: {answer:?}");
            return Ok(());
        };
        ensure!((200..300).contains(&answer.status), "it has to be done: {answer:?}");
        match action {
            Action::Read { at } => self.compare_contents(*at, &answer)?,
            Action::Write { .. } => ensure!(answer.body["exit_code"] == 0, "{answer:?}"),
            Action::Promote { .. } => {
                let deleted: BTreeSet<&str> = answer.body["deleted"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .filter_map(Value::as_str)
                    .collect();
                let expected = gone.iter().map(|at| self.id(*at)).collect::<Result<BTreeSet<_>>>()?;
                ensure!(deleted == expected, "deleted should be {expected:?}: {answer:?}");
            }
            _ => {}
        }
        self.name(action, &made, &answer)?;
        for at in gone {
            self.forget(at);
        }
        match action {
            Action::Delete { at } | Action::DeleteSnapshot { snapshot: at } => self.forget(*at),
            Action::Create => {
                let id = self.id(made[0])?;
                self.api.exec(id, FURNISH)?;
            }
            Action::Fork { .. } | Action::ForkTree { .. } | Action::FromSnapshot { .. } => {
                for at in made {
                    let read = self.ask(&Action::Read { at })?;
                    self.compare_contents(at, &read).context("a copy right after its birth")?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn ask(&self, action: &Action) -> Result<Answer> {
        let verb = |at: &Handle, verb: &str| self.api.verb(self.id(*at)?, verb);
        match action {
            Action::Create => self.api.post_patiently("/v1/sandboxes", &json!({"template": "base"})),
            Action::Write { at, key, value, synced } => {
                let sync = if *synced { "sync" } else { "true" };
                self.exec(
                    *at,
                    &format!(
                        "for d in /root /dev/shm; do echo {value} > $d/model/{key} || exit 1; done; {sync}"
                    ),
                )
            }
            Action::Read { at } => self.exec(*at, READ),
            Action::Pause { at } => verb(at, "pause"),
            Action::Resume { at } => verb(at, "resume"),
            Action::Hibernate { at } => verb(at, "hibernate"),
            Action::Wake { at } => verb(at, "wake"),
            Action::Snapshot { at } => verb(at, "snapshots"),
            Action::FromSnapshot { snapshot } => self.api.post_patiently(
                "/v1/sandboxes",
                &json!({"template": "base", "from_snapshot": self.id(*snapshot)?}),
            ),
            Action::DeleteSnapshot { snapshot } => {
                self.api.call("DELETE", &format!("/v1/snapshots/{}", self.id(*snapshot)?), None)
            }
            Action::Fork { at } => {
                self.api.post_patiently(&format!("/v1/sandboxes/{}/fork", self.id(*at)?), &json!({}))
            }
            Action::ForkTree { at, count } => self.api.post_patiently(
                &format!("/v1/sandboxes/{}/fork-tree", self.id(*at)?),
                &json!({"count": count}),
            ),
            Action::Promote { at } => {
                let path = format!("/v1/sandboxes/{}/promote", self.id(*at)?);
                self.api.call("POST", &path, Some(&json!({"cleanup_siblings": true})))
            }
            Action::Delete { at } => self.api.delete(self.id(*at)?),
        }
    }

    fn exec(&self, at: Handle, cmd: &str) -> Result<Answer> {
        let body = json!({"cmd": cmd, "timeout_seconds": 50});
        self.api.call("POST", &format!("/v1/sandboxes/{}/exec", self.id(at)?), Some(&body))
    }

    /// Notes the ids of what was made.
    fn name(&mut self, action: &Action, made: &[Handle], answer: &Answer) -> Result<()> {
        let told = match action {
            Action::Fork { .. } | Action::ForkTree { .. } => ids(&answer.body["children"]),
            _ if made.is_empty() => Vec::new(),
            _ => vec![answer.text("id")?],
        };
        ensure!(told.len() == made.len(), "{} were expected: {answer:?}", made.len());
        for (handle, id) in made.iter().zip(told) {
            ensure!(!self.ids.values().any(|other| *other == id), "the id {id} is used twice");
            self.ids.insert(*handle, id);
        }
        Ok(())
    }

    fn forget(&mut self, at: Handle) {
        self.ids.remove(&at);
        self.machines.remove(&at);
    }

    fn id(&self, at: Handle) -> Result<&str> {
        self.ids.get(&at).map(String::as_str).with_context(|| format!("{at} has no id"))
    }

    /// Every sandbox is listed in its state, every snapshot is listed, and nothing else is.
    fn compare(&self) -> Result<()> {
        let mut listed = BTreeMap::new();
        for one in self.api.list()? {
            let (Some(id), Some(status)) = (one["id"].as_str(), one["status"].as_str()) else {
                bail!("{one}")
            };
            listed.insert(id.to_owned(), status.to_owned());
        }
        let expected: BTreeMap<String, String> = self
            .world
            .sandboxes()
            .iter()
            .map(|(at, sandbox)| Ok((self.id(*at)?.to_owned(), sandbox.state.as_str().to_owned())))
            .collect::<Result<_>>()?;
        ensure!(listed == expected, "listed are {listed:?}; the model has {expected:?}");
        let snapshots = BTreeSet::from_iter(self.api.snapshots()?);
        let expected =
            self.world.snapshots().keys().map(|at| Ok(self.id(*at)?.to_owned())).collect::<Result<_>>()?;
        ensure!(snapshots == expected, "snapshots are {snapshots:?}; the model has {expected:?}");
        Ok(())
    }

    fn compare_contents(&mut self, at: Handle, answer: &Answer) -> Result<()> {
        ensure!(answer.status == 200, "{answer:?}");
        let (mut found, mut alive, mut machine) = (Contents::default(), false, String::new());
        for line in answer.text("stdout")?.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            match *words.as_slice() {
                ["disk", key, value] => drop(found.disk.insert(key.parse()?, value.parse()?)),
                ["memory", key, value] => drop(found.memory.insert(key.parse()?, value.parse()?)),
                ["alive"] => alive = true,
                ["machine", id] => id.clone_into(&mut machine),
                _ => bail!("the guest says {line:?}"),
            }
        }
        let expected = &self.world.sandboxes()[&at].contents;
        ensure!(found == *expected, "{at} has {found:?}; the model has {expected:?}");
        ensure!(alive, "the process of {at} is gone");
        let known = self.machines.entry(at).or_insert_with(|| machine.clone());
        ensure!(*known == machine, "{at} was {known} and is now {machine}");
        let same = self.machines.values().filter(|other| **other == machine).count();
        ensure!(same == 1 && !machine.is_empty(), "machine-id {machine:?} is there {same} times");
        Ok(())
    }
}
