//! Which images a Dockerfile starts from: all that the host needs to know of one, so that it can lay out their disks.
//!
//! Owns: finding the names behind `FROM`. Refuses to know everything else: whether the file makes sense is said by the
//! program that builds it. A name that is missed here is one that it does not find.

/// Templates that a build can have beside its target: as many read-only drives there are, less one in reserve.
pub const MOST: usize = 3;

/// What a Dockerfile starts from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bases {
    /// The names behind `FROM`, each once, in order, without stages of the file itself and `scratch`.
    pub names: Vec<String>,
    /// The name behind the last `FROM`, if it is one of them.
    pub last: Option<String>,
}

/// Finds them.
pub fn bases(text: &str) -> Bases {
    let mut found = Bases::default();
    let mut stages: Vec<String> = Vec::new();
    for instruction in instructions(text) {
        let mut words = instruction.split_whitespace();
        if !words.next().is_some_and(|word| word.eq_ignore_ascii_case("from")) {
            continue;
        }
        let mut words = words.skip_while(|word| word.starts_with("--"));
        let Some(name) = words.next() else { continue };
        let is_stage = stages.iter().any(|stage| stage.eq_ignore_ascii_case(name));
        let is_known = is_stage || name.eq_ignore_ascii_case("scratch") || name.contains('$');
        found.last = (!is_known).then(|| name.to_owned());
        if !is_known && !found.names.iter().any(|other| other == name) {
            found.names.push(name.to_owned());
        }
        if words.next().is_some_and(|word| word.eq_ignore_ascii_case("as"))
            && let Some(stage) = words.next()
        {
            stages.push(stage.to_owned());
        }
    }
    found
}

/// The name of a template that a name behind `FROM` may mean: `base:latest` is `base`.
pub fn template(name: &str) -> &str {
    name.strip_suffix(":latest").unwrap_or(name)
}

/// Instructions with their continuations on one line, without comments and the bodies of heredocs.
fn instructions(text: &str) -> Vec<String> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let escape = escape(text);
    let mut lines = text.lines();
    let mut found = Vec::new();
    while let Some(line) = lines.next() {
        let mut whole = String::new();
        let mut line = Some(line);
        while let Some(part) = line {
            let trimmed = part.trim();
            // Comments and empty lines within an instruction are left out, and do not end it.
            let skipped = trimmed.starts_with('#') || (trimmed.is_empty() && !whole.is_empty());
            let more = match trimmed.strip_suffix(escape) {
                _ if skipped => !whole.is_empty(),
                Some(head) => {
                    whole.push_str(head);
                    whole.push(' ');
                    true
                }
                None => {
                    whole.push_str(trimmed);
                    false
                }
            };
            line = if more { lines.next() } else { None };
        }
        for end in heredocs(&whole) {
            for body in lines.by_ref() {
                if body.trim_start_matches('\t') == end {
                    break;
                }
            }
        }
        if !whole.trim().is_empty() {
            found.push(whole);
        }
    }
    found
}

/// The character that joins lines, which a directive at the top may change.
fn escape(text: &str) -> char {
    let directives = text.lines().map_while(|line| line.trim().strip_prefix('#')?.split_once('='));
    let is_escape = |(key, _): &(&str, &str)| key.trim().eq_ignore_ascii_case("escape");
    match directives.into_iter().find(is_escape) {
        Some((_, value)) if value.trim() == "`" => '`',
        _ => '\\',
    }
}

/// The words that end the heredocs of an instruction which may have some.
fn heredocs(instruction: &str) -> Vec<String> {
    let word = instruction.split_whitespace().next().unwrap_or_default();
    if !["run", "copy", "add"].iter().any(|name| word.eq_ignore_ascii_case(name)) {
        return Vec::new();
    }
    let end = |rest: &str| {
        let rest = rest.strip_prefix('-').unwrap_or(rest);
        let word = rest.trim_start_matches(['"', '\'']);
        let word: String = word.chars().take_while(|c| c.is_alphanumeric() || "_.-".contains(*c)).collect();
        (!word.is_empty() && !rest.starts_with('<')).then_some(word)
    };
    instruction.split("<<").skip(1).filter_map(end).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn names(text: &str) -> (Vec<String>, Option<String>) {
        let Bases { names, last } = bases(text);
        (names, last)
    }

    #[test]
    fn the_names_behind_from_are_found() {
        for (text, expected, last) in [
            ("FROM base\nRUN true\n", &["base"][..], Some("base")),
            ("from  --platform=linux/amd64 base:latest", &["base:latest"], Some("base:latest")),
            (
                "# syntax=docker/dockerfile:1\nFROM a AS one\nFROM b\nCOPY --from=one / /",
                &["a", "b"],
                Some("b"),
            ),
            ("FROM a AS one\nFROM ONE", &["a"], None),
            ("FROM a\nFROM scratch", &["a"], None),
            ("FROM a\nFROM a", &["a"], Some("a")),
            ("ARG X=base\nFROM $X\nFROM ${X:-y}", &[], None),
            ("FROM \\\n  # why\n\n  base \\\n  AS x\nFROM x", &["base"], None),
            ("# escape=`\nFROM `\n base", &["base"], Some("base")),
            ("FROM base\nRUN <<EOF\nFROM other\nEOF\nRUN x", &["base"], Some("base")),
            ("FROM base\nCOPY <<-\"A.b\" <<'C' /x/\nFROM p\n\tA.b\nFROM q\nC\n", &["base"], Some("base")),
            ("FROM base\nRUN cat <<<word\nFROM next", &["base", "next"], Some("next")),
            ("FROM base\nRUN echo \\\nFROM other", &["base"], Some("base")),
            ("FROM", &[], None),
            ("FROMAGE x\n", &[], None),
            ("\u{feff}FROM base", &["base"], Some("base")),
        ] {
            let expected: Vec<String> = expected.iter().map(|name| (*name).to_owned()).collect();
            assert_eq!(names(text), (expected, last.map(str::to_owned)), "{text:?}");
        }
        assert_eq!((template("base:latest"), template("base:1")), ("base", "base:1"));
    }

    proptest! {
        #[test]
        fn no_text_panics_and_all_names_are_words_of_it(text in "(?s).{0,400}") {
            let Bases { names, last } = bases(&text);
            for name in &names {
                prop_assert!(text.contains(name.as_str()) && !name.contains(char::is_whitespace));
            }
            prop_assert!(last.is_none_or(|last| names.contains(&last)));
        }

        #[test]
        fn plain_stages_are_all_found(stages in prop::collection::vec("[a-z]{1,8}", 1..8)) {
            let text: String = stages.iter().map(|name| format!("FROM t-{name}\nRUN echo FROM x\n")).collect();
            let found = bases(&text);
            prop_assert_eq!(found.last, stages.last().map(|name| format!("t-{name}")));
            let all = stages.iter().all(|name| found.names.contains(&format!("t-{name}")));
            prop_assert!(all);
        }
    }
}
