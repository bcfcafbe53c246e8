//! How far an appliance is with the templates that everybody may create from.
//!
//! Owns: what storage's answer says about it, and the wait. Refuses to know: how root's shell in the appliance is reached.
//! Hidden templates do not count: the builder's is baked when the first build asks for it.

use std::{
    collections::BTreeMap,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

const ASK: &str = "busctl --json=short call ai.pandastack.storage1 /ai/pandastack/storage1 ai.pandastack.storage1.Manager Templates";
const LOOK: Duration = Duration::from_secs(2);
/// Something is said at least this often.
const WORD: Duration = Duration::from_secs(15);

/// Waits until sandboxes can be made of every template. `shell` is root's in the appliance, `say` is told how far it is.
///
/// # Errors
/// At the deadline, or when one of them cannot be used, with the states of all.
pub fn wait_baked(
    shell: impl Fn(&str) -> Result<String>,
    within: Duration,
    say: impl Fn(&str),
) -> Result<()> {
    let deadline = Instant::now() + within;
    let (mut last, mut said) = (String::new(), Instant::now());
    loop {
        let states = states(&shell(ASK)?)?;
        if !states.is_empty() && states.values().all(|state| state == "baked") {
            return Ok(());
        }
        let each: Vec<String> = states.iter().map(|(name, state)| format!("{name}: {state}")).collect();
        let now = each.join(", ");
        if states.values().any(|state| state == "failed") || Instant::now() > deadline {
            bail!("templates are not baked: {now}");
        }
        if now != last || said.elapsed() > WORD {
            say(&format!("templates: {now}"));
            (last, said) = (now, Instant::now());
        }
        sleep(LOOK);
    }
}

/// State by name. The places of a structure's fields are those of `pandastack_bus`.
fn states(answer: &str) -> Result<BTreeMap<String, String>> {
    let answer: Value = serde_json::from_str(answer)?;
    let text = |value: &Value| value.as_str().map(str::to_owned).context("a text was expected");
    let mut states = BTreeMap::new();
    for one in answer["data"][0].as_array().context("no array of templates")? {
        if !one[3].as_bool().context("hidden")? {
            states.insert(text(&one[0])?, text(&one[16])?);
        }
    }
    Ok(states)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(hidden_state: &str, state: &str) -> String {
        let one = |name: &str, hidden: bool, state: &str| {
            format!(
                r#"["{name}","{name}","",{hidden},0,[],"","base",[],2,2048,4096,{{}},"/","",9,"{state}",""]"#
            )
        };
        format!(
            r#"{{"type":"a(x)","data":[[{},{}]]}}"#,
            one("builder", true, hidden_state),
            one("base", false, state)
        )
    }

    #[test]
    fn a_hidden_template_is_not_waited_for_and_a_failed_one_ends_the_wait() {
        let wait = |answer: String| wait_baked(|_| Ok(answer.clone()), Duration::ZERO, |_| ());

        wait(answer("unbaked", "baked")).expect("all that count are baked");
        let unbaked = wait(answer("baked", "unbaked")).expect_err("one is not");
        assert_eq!(unbaked.to_string(), "templates are not baked: base: unbaked");
        assert!(wait(answer("baked", "failed")).is_err());
        assert!(wait(r#"{"data":[[]]}"#.into()).is_err(), "none at all");
    }
}
