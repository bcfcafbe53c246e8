//! Mutations of JSON that stay JSON: what a parser refuses at its first byte tests nothing behind it. Pure.

use serde_json::{Value, json};

/// Random numbers that a seed repeats (SplitMix64).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Numbers of this seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next one.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// One below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.draw() % end as u64) as usize
    }
}

/// Changes one place of a value; `names` are fields that somebody may know.
pub fn change(value: &mut Value, names: &[String], random: &mut Random) {
    let mut places = count(value);
    let mut at = random.below(places.max(1));
    places = 0;
    visit(value, &mut at, &mut |found| {
        places += 1;
        alter(found, names, random);
    });
    debug_assert_eq!(places, 1, "one place is changed");
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(all) => all.iter().map(count).sum(),
        Value::Object(all) => all.values().map(count).sum(),
        _ => 0,
    }
}

/// Calls `found` with the value in place `at`, in the order of [`count`].
fn visit(value: &mut Value, at: &mut usize, found: &mut impl FnMut(&mut Value)) -> bool {
    if *at == 0 {
        found(value);
        return true;
    }
    *at -= 1;
    match value {
        Value::Array(all) => all.iter_mut().any(|value| visit(value, at, found)),
        Value::Object(all) => all.values_mut().any(|value| visit(value, at, found)),
        _ => false,
    }
}

fn alter(value: &mut Value, names: &[String], random: &mut Random) {
    match (random.below(4), value) {
        (0, Value::Object(all)) if !all.is_empty() => {
            let gone = all.keys().nth(random.below(all.len())).cloned();
            gone.and_then(|key| all.remove(&key));
        }
        (0 | 1, Value::Object(all)) => {
            let name = names.get(random.below(names.len().max(1))).cloned().unwrap_or_default();
            all.insert(name, odd(random));
        }
        (0 | 1, Value::Array(all)) => match all.first().cloned() {
            Some(first) if random.below(2) == 0 => all.extend(std::iter::repeat_n(first, random.below(40))),
            _ => all.push(odd(random)),
        },
        (0 | 1, Value::String(text)) => {
            let at =
                (0..=text.len()).filter(|at| text.is_char_boundary(*at)).nth(random.below(text.len() + 1));
            text.insert_str(at.unwrap_or_default(), &odd_text(random));
        }
        (0 | 1, Value::Number(number)) => {
            let near = number.as_i64().unwrap_or_default().wrapping_add(random.below(5) as i64 - 2);
            *number = near.into();
        }
        (_, value) => *value = odd(random),
    }
}

fn odd(random: &mut Random) -> Value {
    const NUMBERS: [i64; 10] = [0, -1, 1, 2, 255, 65_536, i64::MAX, i64::MIN, 4_294_967_296, 86_400_001];
    match random.below(9) {
        0 => Value::Null,
        1 => Value::Bool(random.below(2) == 0),
        2 => NUMBERS[random.below(NUMBERS.len())].into(),
        3 => json!(u64::MAX),
        4 => json!(1e308),
        5 => json!({"": {}, "a": [1]}),
        6 => json!([]),
        7 => (0..random.below(60)).fold(json!("deep"), |inner, _| json!([inner])),
        _ => odd_text(random).into(),
    }
}

fn odd_text(random: &mut Random) -> String {
    const TEXTS: [&str; 18] = [
        "",
        "\0",
        "/",
        "..",
        "/../../etc",
        "a\nb",
        "\u{202e}",
        "é",
        "\u{1F600}",
        "-1",
        "A=B",
        "base",
        "%00",
        " ",
        "/workspace/x",
        "00000000000000000000",
        "2026-01-01T00:00:00Z",
        "\u{feff}",
    ];
    match random.below(TEXTS.len() + 1) {
        at if at < TEXTS.len() => TEXTS[at].to_owned(),
        _ => "x".repeat(1 << random.below(13)),
    }
}

/// Changes an input: the JSON behind its head where it has some and the seed says so, otherwise bytes.
pub fn input(input: &mut Vec<u8>, json_after: Option<usize>, names: &[String], random: &mut Random) {
    if let Some(head) = json_after
        && random.below(4) > 0
        && let Some(Ok(mut value)) = input.get(head..).map(serde_json::from_slice::<Value>)
    {
        for _ in 0..=random.below(3) {
            change(&mut value, names, random);
        }
        input.truncate(head);
        input.extend_from_slice(value.to_string().as_bytes());
        return;
    }
    for _ in 0..=random.below(8) {
        let at = random.below(input.len() + 1);
        match random.below(5) {
            0 if at < input.len() => input[at] ^= 1 << random.below(8),
            1 if at < input.len() => input[at] = random.draw() as u8,
            2 if at < input.len() => drop(input.drain(at..(at + 1 + random.below(16)).min(input.len()))),
            3 => {
                let end = (at + random.below(64)).min(input.len());
                let piece = input[at..end].to_vec();
                input.splice(at..at, piece);
            }
            _ => input.insert(at, random.draw() as u8),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_stays_json_and_changes() {
        let names = ["cmd".to_owned(), "env".to_owned()];
        let mut changed = 0;
        for seed in 0..2000 {
            let mut random = Random::new(seed);
            let start = br#"??{"cmd":"true","env":{"A":"b"},"list":[1,2]}"#.to_vec();
            let mut mutated = start.clone();
            input(&mut mutated, Some(2), &names, &mut random);
            changed += usize::from(mutated != start);
            let mut value: Value = serde_json::from_slice(&start[2..]).expect("JSON");
            change(&mut value, &names, &mut random);
        }
        assert!(changed > 1900, "{changed}");
    }
}
