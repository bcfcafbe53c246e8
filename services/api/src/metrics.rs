//! Counters of this process, and their text for Prometheus.

use std::{
    collections::BTreeMap,
    fmt::Write,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use pandastack_bus::{
    storage::Usage,
    vmm::{Capacity, SandboxInfo},
};

/// How many sandboxes are in each state.
pub type States = BTreeMap<&'static str, u64>;

/// Counts sandboxes; every state is there.
pub fn states(sandboxes: &[SandboxInfo]) -> States {
    let mut states: States =
        ["creating", "running", "paused", "hibernated", "stopping", "failed"].map(|s| (s, 0)).into();
    for sandbox in sandboxes {
        *states.entry(sandbox.state.as_str()).or_default() += 1;
    }
    states
}

const BOUNDS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 2.5, 10.0, 30.0];

/// What was counted.
#[derive(Debug, Default)]
pub struct Metrics(Mutex<Counts>);

#[derive(Debug, Default)]
struct Counts {
    requests: BTreeMap<(&'static str, &'static str, u16), u64>,
    durations: BTreeMap<(&'static str, &'static str), Histogram>,
    refused: BTreeMap<&'static str, u64>,
}

#[derive(Debug, Default)]
struct Histogram {
    buckets: [u64; BOUNDS.len()],
    count: u64,
    seconds: f64,
}

impl Metrics {
    /// A request was answered (its headers: a stream may go on).
    pub fn request(&self, method: &'static str, route: &'static str, status: u16, took: Duration) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.requests.entry((method, route, status)).or_default() += 1;
        let histogram = counts.durations.entry((method, route)).or_default();
        let seconds = took.as_secs_f64();
        histogram.count += 1;
        histogram.seconds += seconds;
        for (bucket, bound) in histogram.buckets.iter_mut().zip(BOUNDS) {
            *bucket += u64::from(seconds <= bound);
        }
    }

    /// A request was refused at the gate.
    pub fn refused(&self, why: &'static str) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).refused.entry(why).or_default() += 1;
    }

    /// All of it as text; each daemon's part only while it answers.
    pub fn render(
        &self,
        capacity: Option<&Capacity>,
        states: Option<&States>,
        space: Option<&Usage>,
    ) -> String {
        let mut out = String::new();
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        head(
            &mut out,
            "pandastack_http_requests_total",
            "counter",
            "Requests answered, by route and status.",
        );
        for ((method, route, status), count) in &counts.requests {
            let labels = format!("method=\"{method}\",route=\"{route}\",status=\"{status}\"");
            let _ = writeln!(out, "pandastack_http_requests_total{{{labels}}} {count}");
        }
        let name = "pandastack_http_request_duration_seconds";
        head(&mut out, name, "histogram", "Time from the request's headers to the answer's.");
        for ((method, route), histogram) in &counts.durations {
            let labels = format!("method=\"{method}\",route=\"{route}\"");
            for (bucket, bound) in histogram.buckets.iter().zip(BOUNDS) {
                let _ = writeln!(out, "{name}_bucket{{{labels},le=\"{bound}\"}} {bucket}");
            }
            let _ = writeln!(out, "{name}_bucket{{{labels},le=\"+Inf\"}} {}", histogram.count);
            let _ = writeln!(out, "{name}_sum{{{labels}}} {}", histogram.seconds);
            let _ = writeln!(out, "{name}_count{{{labels}}} {}", histogram.count);
        }
        head(
            &mut out,
            "pandastack_http_refused_total",
            "counter",
            "Requests refused before any route, by reason.",
        );
        for (why, count) in &counts.refused {
            let _ = writeln!(out, "pandastack_http_refused_total{{reason=\"{why}\"}} {count}");
        }
        drop(counts);
        head(&mut out, "pandastack_vmm_up", "gauge", "Whether the vmm daemon answers.");
        let _ = writeln!(out, "pandastack_vmm_up {}", u8::from(capacity.is_some()));
        if let Some(capacity) = capacity {
            let mib = |mib: u64| mib.saturating_mul(1 << 20);
            for (name, kind, help, value) in [
                ("pandastack_slots_ready", "gauge", "Prepared slots waiting.", u64::from(capacity.slots)),
                (
                    "pandastack_slots_wanted",
                    "gauge",
                    "Slots that are kept ready.",
                    u64::from(capacity.slots_wanted),
                ),
                (
                    "pandastack_memory_available_bytes",
                    "gauge",
                    "Memory available on the host.",
                    mib(capacity.memory_available_mib),
                ),
                (
                    "pandastack_memory_reserve_bytes",
                    "gauge",
                    "Memory below which creates are refused.",
                    mib(capacity.memory_reserve_mib),
                ),
                (
                    "pandastack_sandbox_creates_total",
                    "counter",
                    "Creates that succeeded since vmm started.",
                    capacity.creates_total,
                ),
                (
                    "pandastack_sandbox_create_failures_total",
                    "counter",
                    "Creates that were refused or failed since vmm started.",
                    capacity.create_failures_total,
                ),
            ] {
                head(&mut out, name, kind, help);
                let _ = writeln!(out, "{name} {value}");
            }
        }
        head(&mut out, "pandastack_storage_up", "gauge", "Whether the storage daemon answers.");
        let _ = writeln!(out, "pandastack_storage_up {}", u8::from(space.is_some()));
        if let Some(space) = space {
            for (name, help, value) in [
                ("pandastack_storage_size_bytes", "Size of the data partition.", space.total_bytes),
                ("pandastack_storage_free_bytes", "Space left on it.", space.free_bytes),
                (
                    "pandastack_storage_reserve_bytes",
                    "Space below which nothing new is made.",
                    space.reserve_bytes,
                ),
            ] {
                head(&mut out, name, "gauge", help);
                let _ = writeln!(out, "{name} {value}");
            }
        }
        for (name, help, value) in host() {
            head(&mut out, name, "gauge", help);
            let _ = writeln!(out, "{name} {value}");
        }
        if let Some(states) = states {
            head(&mut out, "pandastack_sandboxes", "gauge", "Sandboxes by state.");
            for (state, count) in states {
                let _ = writeln!(out, "pandastack_sandboxes{{state=\"{state}\"}} {count}");
            }
        }
        out
    }
}

/// What the kernel tells of the host; what it does not tell is left out.
fn host() -> Vec<(&'static str, &'static str, f64)> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let (load, memory) = (read("/proc/loadavg"), read("/proc/meminfo"));
    let first = |text: &str| text.split_whitespace().next().and_then(|word| word.parse::<f64>().ok());
    let total = memory.lines().find_map(|line| line.strip_prefix("MemTotal:")).and_then(first);
    let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    [
        ("pandastack_host_load1", "Processes that run or want to, the mean of a minute.", first(&load)),
        ("pandastack_host_memory_bytes", "Memory of the host.", total.map(|kib| kib * 1024.0)),
        ("pandastack_host_processors", "Processors of the host.", Some(cores)),
    ]
    .into_iter()
    .filter_map(|(name, help, value)| Some((name, help, value?)))
    .collect()
}

fn head(out: &mut String, name: &str, kind: &str, help: &str) {
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_counts() {
        let metrics = Metrics::default();
        metrics.request("GET", "/healthz", 200, Duration::from_millis(3));
        metrics.request("GET", "/healthz", 200, Duration::from_secs(60));
        let space = Usage { total_bytes: 9, free_bytes: 5, reserve_bytes: 3 };
        let text = metrics.render(None, Some(&states(&[])), Some(&space));

        let route = "method=\"GET\",route=\"/healthz\"";
        for line in [
            format!("pandastack_http_requests_total{{{route},status=\"200\"}} 2"),
            format!("pandastack_http_request_duration_seconds_bucket{{{route},le=\"0.0025\"}} 0"),
            format!("pandastack_http_request_duration_seconds_bucket{{{route},le=\"0.005\"}} 1"),
            format!("pandastack_http_request_duration_seconds_bucket{{{route},le=\"+Inf\"}} 2"),
            "pandastack_vmm_up 0".to_owned(),
            "pandastack_storage_up 1".to_owned(),
            "pandastack_storage_free_bytes 5".to_owned(),
            "pandastack_sandboxes{state=\"running\"} 0".to_owned(),
        ] {
            assert!(text.lines().any(|have| have == line), "{line} in\n{text}");
        }
    }

    /// The rules of the text format that a scraper refuses a page for: each family is declared once, before its samples, which
    /// stand together, are each there once and have numbers; the page ends with a newline.
    #[test]
    fn the_text_is_what_a_scraper_reads() {
        let metrics = Metrics::default();
        metrics.request("GET", "/v1/sandboxes/{id}", 200, Duration::from_millis(3));
        metrics.request("POST", "/v1/sandboxes", 201, Duration::from_millis(3));
        metrics.refused("unauthorized");
        let capacity = Capacity { sandboxes: 1, running: 1, ..Capacity::default() };
        let text = metrics.render(Some(&capacity), Some(&states(&[])), Some(&Usage::default()));
        assert!(text.ends_with('\n') && !text.contains("\n\n"));
        let (mut families, mut samples, mut kind) = (Vec::new(), std::collections::HashSet::new(), "");
        for line in text.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, help) = help.split_once(' ').unwrap();
                assert!(!help.is_empty() && !families.contains(&name), "{line}");
                families.push(name);
                continue;
            }
            let family = *families.last().unwrap();
            if let Some(declared) = line.strip_prefix("# TYPE ") {
                let (name, of_kind) = declared.split_once(' ').unwrap();
                assert!(name == family && ["counter", "gauge", "histogram"].contains(&of_kind), "{line}");
                kind = of_kind;
                continue;
            }
            let (series, value) = line.rsplit_once(' ').unwrap();
            let name = series.split('{').next().unwrap();
            let suffixes: &[&str] = if kind == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
            let belongs = suffixes.iter().any(|suffix| name.strip_suffix(suffix) == Some(family));
            assert!(belongs && value.parse::<f64>().is_ok_and(f64::is_finite), "{line}");
            assert!(name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'), "{line}");
            assert!(samples.insert(series), "{line} is there twice");
            assert_eq!(name.ends_with("_total"), kind == "counter", "{line}");
        }
    }
}
