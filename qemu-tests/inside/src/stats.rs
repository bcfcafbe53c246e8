//! Percentiles of a series of measurements.

use serde::Serialize;

/// A row of the benchmark table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// Unit of the percentiles.
    pub unit: String,
    /// Half of the measurements are at most this.
    pub p50: f64,
    /// 95 of 100 are.
    pub p95: f64,
    /// 99 of 100 are.
    pub p99: f64,
    /// `p50` over the `p50` of `against`, both taken in this run; 1 for a row that stands for itself.
    pub ratio: f64,
    /// What the ratio is against; empty for none.
    pub against: String,
}

/// The row of a series, `None` for an empty one.
pub fn row(unit: &str, mut series: Vec<f64>, against: Option<(&str, f64)>) -> Option<Row> {
    if series.is_empty() {
        return None;
    }
    series.sort_by(f64::total_cmp);
    let at = |share: f64| series[((series.len() as f64 * share).ceil() as usize).clamp(1, series.len()) - 1];
    let p50 = at(0.50);
    let (against, ratio) = against.map_or((String::new(), 1.0), |(name, base)| (name.to_owned(), p50 / base));
    Some(Row { unit: unit.to_owned(), p50, p95: at(0.95), p99: at(0.99), ratio, against })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_measurements_that_were_taken() {
        let made = row("us", (1..=100).map(f64::from).rev().collect(), Some(("base", 25.0)));

        let made = made.expect("the series is not empty");
        assert_eq!((made.p50, made.p95, made.p99, made.ratio), (50.0, 95.0, 99.0, 2.0));
    }

    #[test]
    fn nothing_measured_is_no_row() {
        assert_eq!(row("us", Vec::new(), None), None);
    }
}
