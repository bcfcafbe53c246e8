//! What sandboxes take of the host over time: pure but for its lock, bounded, in memory.
//!
//! Owns: how rates follow from counters, how old points become coarser, sums per workspace. Refuses to know: where counters come
//! from, whose clock it is. A restart begins anew.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use pandastack_bus::vmm::Series;

/// Seconds between two samples.
pub const TICK: u32 = 15;
/// Seconds per point, and points kept: an hour, six hours, a day.
const LEVELS: [(u32, usize); 3] = [(TICK, 240), (60, 360), (300, 288)];
/// Longest time between two samples that still belong together.
const GAP: u32 = 4 * TICK;

/// What is measured of a sandbox, in the order of its values.
const OF_SANDBOX: [&str; VALUES] =
    ["cpu_percent", "memory_bytes", "disk_read_bytes_per_second", "disk_write_bytes_per_second"];
/// How many.
const VALUES: usize = 4;

/// What a unit has used so far, as its cgroup counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Microseconds of processor time.
    pub cpu_usec: u64,
    /// Memory charged to it now, page cache included.
    pub memory_bytes: u64,
    /// Bytes read from disks.
    pub read_bytes: u64,
    /// Bytes written to disks.
    pub write_bytes: u64,
}

impl Usage {
    /// From the texts of `cpu.stat`, `memory.current` and `io.stat`; what is missing counts as 0.
    pub fn parse(cpu: &str, memory: &str, io: &str) -> Self {
        let number = |text: &str| text.trim().parse().unwrap_or(0);
        let cpu_usec = cpu.lines().find_map(|line| line.strip_prefix("usage_usec ")).map_or(0, number);
        let sum = |key: &str| {
            io.split_whitespace()
                .filter_map(|word| word.strip_prefix(key))
                .fold(0u64, |sum, value| sum.saturating_add(number(value)))
        };
        Self {
            cpu_usec,
            memory_bytes: number(memory),
            read_bytes: sum("rbytes="),
            write_bytes: sum("wbytes="),
        }
    }
}

/// Whose usage it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// The sandbox.
    pub sandbox: String,
    /// Its workspace.
    pub workspace: String,
    /// The unit that counts: another one counts from 0.
    pub machine: String,
    /// Since it was started.
    pub usage: Usage,
}

/// All series.
#[derive(Debug, Default)]
pub struct Meter(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    sandboxes: HashMap<String, Metered>,
    workspaces: HashMap<String, Rings>,
}

#[derive(Debug, Default)]
struct Metered {
    last: Option<(u32, Sample)>,
    rings: Rings,
}

impl Meter {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in the usage of all that run, at this Unix second. `known` are all that there are; what is known of others goes.
    pub fn tick(&self, now: u32, samples: Vec<Sample>, known: &HashSet<String>) {
        let mut state = self.state();
        let State { sandboxes, workspaces } = &mut *state;
        sandboxes.retain(|id, _| known.contains(id));
        let mut sums = HashMap::<String, [f32; VALUES]>::new();
        for sample in samples {
            let metered = sandboxes.entry(sample.sandbox.clone()).or_default();
            let before = metered.last.replace((now, sample.clone()));
            let Some(values) = before.and_then(|(then, before)| rates(then, &before, now, &sample)) else {
                continue;
            };
            metered.rings.push(now, values);
            let sum = sums.entry(sample.workspace).or_default();
            sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        }
        workspaces.retain(|_, rings| rings.last().is_some_and(|last| now.saturating_sub(last) < 86_400));
        for (workspace, sum) in sums {
            workspaces.entry(workspace).or_default().push(now, sum);
        }
    }

    /// The series of a sandbox, or for the empty name those of all of a workspace together.
    pub fn series(&self, workspace: &str, sandbox: &str, from: u64, to: u64, step: u32) -> Vec<Series> {
        let state = self.state();
        let rings = match sandbox.is_empty() {
            true => state.workspaces.get(workspace),
            false => state.sandboxes.get(sandbox).map(|metered| &metered.rings),
        };
        let points = rings.map(|rings| rings.between(from, to, step)).unwrap_or_default();
        let series = |(index, name): (usize, &&str)| Series {
            name: (*name).to_owned(),
            points: points.iter().map(|(at, values)| (*at, f64::from(values[index]))).collect(),
        };
        OF_SANDBOX.iter().enumerate().map(series).collect()
    }
}

/// What was used between two samples; nothing when they do not belong together.
fn rates(then: u32, before: &Sample, now: u32, after: &Sample) -> Option<[f32; VALUES]> {
    let seconds = now.checked_sub(then).filter(|seconds| (1..=GAP).contains(seconds))?;
    if before.machine != after.machine {
        return None;
    }
    let per_second = |before: u64, after: u64| Some(after.checked_sub(before)? as f32 / seconds as f32);
    let (before, after) = (before.usage, after.usage);
    Some([
        // Percent of one processor.
        per_second(before.cpu_usec, after.cpu_usec)? / 10_000.0,
        after.memory_bytes as f32,
        per_second(before.read_bytes, after.read_bytes)?,
        per_second(before.write_bytes, after.write_bytes)?,
    ])
}

/// Points of three resolutions.
#[derive(Debug, Default)]
struct Rings([Ring; LEVELS.len()]);

#[derive(Debug, Default)]
struct Ring {
    points: VecDeque<(u32, [f32; VALUES])>,
    /// Sum and number of what belongs into the point that is not complete, and its beginning.
    open: (u32, [f32; VALUES], u32),
}

impl Rings {
    fn last(&self) -> Option<u32> {
        self.0[0].points.back().map(|(at, _)| *at)
    }

    fn push(&mut self, now: u32, values: [f32; VALUES]) {
        for (ring, (seconds, kept)) in self.0.iter_mut().zip(LEVELS) {
            if seconds == TICK {
                ring.points.push_back((now, values));
            } else {
                let begin = now - now % seconds;
                if ring.open.0 != begin {
                    let complete = ring.close();
                    ring.points.extend(complete);
                    ring.open = (begin, [0.0; VALUES], 0);
                }
                ring.open.1.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
                ring.open.2 += 1;
            }
            while ring.points.len() > kept {
                ring.points.pop_front();
            }
        }
    }

    /// Means per step. The finest resolution that reaches back to `from` is used, or the one that reaches back furthest.
    fn between(&self, from: u64, to: u64, step: u32) -> Vec<(u64, [f32; VALUES])> {
        let reaches = |ring: &&Ring| ring.points.front().is_some_and(|(at, _)| u64::from(*at) <= from);
        let furthest = |ring: &&Ring| ring.points.front().map_or(u32::MAX, |(at, _)| *at);
        let Some(ring) = self.0.iter().find(reaches).or_else(|| self.0.iter().min_by_key(furthest)) else {
            return Vec::new();
        };
        let mut means = Vec::<(u64, [f32; VALUES], f32)>::new();
        let open = ring.close();
        for (at, values) in ring.points.iter().chain(&open) {
            let at = u64::from(*at);
            if at < from || at > to {
                continue;
            }
            let begin = at - at % u64::from(step.max(1));
            match means.last_mut().filter(|last| last.0 == begin) {
                Some((_, sum, count)) => {
                    sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
                    *count += 1.0;
                }
                None => means.push((begin, *values, 1.0)),
            }
        }
        means.into_iter().map(|(at, sum, count)| (at, sum.map(|value| value / count))).collect()
    }
}

impl Ring {
    /// The point that is not complete, as far as it is.
    fn close(&self) -> Option<(u32, [f32; VALUES])> {
        let (begin, sum, count) = self.open;
        (count > 0).then(|| (begin, sum.map(|value| value / count as f32)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample(sandbox: &str, machine: &str, cpu_usec: u64) -> Sample {
        let usage = Usage { cpu_usec, memory_bytes: 1 << 20, ..Usage::default() };
        Sample { sandbox: sandbox.into(), workspace: "w".into(), machine: machine.into(), usage }
    }

    fn known(ids: &[&str]) -> HashSet<String> {
        ids.iter().map(|id| (*id).to_owned()).collect()
    }

    fn cpu(meter: &Meter, sandbox: &str) -> Vec<(u64, f64)> {
        meter.series("w", sandbox, 0, u64::MAX, TICK).swap_remove(0).points
    }

    #[test]
    fn cgroups_are_understood() {
        let usage = Usage::parse(
            "usage_usec 7\nuser_usec 5\n",
            "4096\n",
            "8:0 rbytes=1 wbytes=2 rios=3\n8:16 rbytes=10 wbytes=20\n",
        );
        assert_eq!(usage, Usage { cpu_usec: 7, memory_bytes: 4096, read_bytes: 11, write_bytes: 22 });
        assert_eq!(Usage::parse("", "max", "x"), Usage::default());
    }

    #[test]
    fn rates_need_two_samples_of_one_machine() {
        let meter = Meter::default();
        meter.tick(1500, vec![sample("a", "m", 0), sample("b", "n", 0)], &known(&["a", "b"]));
        assert!(cpu(&meter, "a").is_empty());
        meter.tick(
            1515,
            vec![sample("a", "m", 15_000_000), sample("b", "n", 7_500_000)],
            &known(&["a", "b"]),
        );
        assert_eq!((cpu(&meter, "a"), cpu(&meter, "b")), (vec![(1515, 100.0)], vec![(1515, 50.0)]));
        assert_eq!(cpu(&meter, ""), [(1515, 150.0)]);
        // Woken on another machine, whose counters begin anew; then asleep for long.
        meter.tick(1530, vec![sample("a", "other", 99)], &known(&["a"]));
        meter.tick(3000, vec![sample("a", "other", 99)], &known(&["a"]));
        assert_eq!(cpu(&meter, "a").len(), 1);
        assert!(cpu(&meter, "b").is_empty());
        assert!(meter.series("w", "nobody", 0, 9, 15).iter().all(|series| series.points.is_empty()));
    }

    proptest! {
        /// However long it goes on: memory is bounded, points lie in order within what is asked for, and a constant stays one.
        #[test]
        fn a_constant_stays_one_at_every_resolution(
            ticks in 1u32..7000,
            start in 0u32..1000,
            back in 0u64..90_000,
            step in prop::sample::select(vec![15u32, 60, 300, 3600]),
        ) {
            let mut rings = Rings::default();
            for tick in 0..ticks {
                rings.push(start + tick * TICK, [42.0; VALUES]);
            }
            for (ring, (_, kept)) in rings.0.iter().zip(LEVELS) {
                prop_assert!(ring.points.len() <= kept);
            }
            let end = u64::from(start + (ticks - 1) * TICK);
            let from = end.saturating_sub(back);
            let points = rings.between(from, end, step);
            prop_assert!(!points.is_empty() || back < 300);
            prop_assert!(points.windows(2).all(|pair| pair[0].0 < pair[1].0));
            for (at, values) in points {
                prop_assert!(at % u64::from(step) == 0 && at + u64::from(step) > from && at <= end);
                prop_assert!(values.iter().all(|value| (value - 42.0).abs() < 0.01));
            }
        }
    }
}
