//! `cargo xtask bench chart`: a picture of what `bench target --json` wrote.
//!
//! One column for each kind of request, requests a second above and the median latency below, by
//! depth; both axes of values are logarithmic, so that equal distances are equal ratios to the bare
//! loop.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use plotters::prelude::*;
use serde_json::Value;

use crate::workspace;

/// Where the picture is kept.
const KEPT: &str = "docs/performance.svg";

const SIZE: (u32, u32) = (1280, 720);

/// Sides in the order and the colour in which they are drawn; others are left out.
const SIDES: &[(&str, RGBColor)] = &[
    ("bare loop", RGBColor(0x55, 0x55, 0x55)),
    ("plain", RGBColor(0x1b, 0x6f, 0xb5)),
    ("TLS AES-128", RGBColor(0xc2, 0x4a, 0x1d)),
    ("TLS AES-256", RGBColor(0x8b, 0x3f, 0x9e)),
];

#[derive(Parser)]
#[command(no_binary_name = true, name = "cargo xtask bench chart")]
struct Args {
    /// What `cargo xtask bench target --json FILE` wrote.
    #[arg(value_name = "FILE")]
    result: PathBuf,
    /// The picture.
    #[arg(long, value_name = "FILE", default_value = KEPT)]
    out: PathBuf,
    /// What it is of: machine, kernel, date.
    #[arg(long, value_name = "TEXT", default_value = "")]
    caption: String,
}

/// Draws; errors say what of the result makes no sense.
pub(super) fn task(rest: &[String]) -> Result<bool> {
    let args = Args::try_parse_from(rest).unwrap_or_else(|error| error.exit());
    let text = fs::read_to_string(&args.result)
        .with_context(|| format!("reading {}", args.result.display()))?;
    let result = Figures::parse(&serde_json::from_str(&text)?)
        .with_context(|| format!("{} is no result of bench target", args.result.display()))?;
    let out = if args.out == Path::new(KEPT) { workspace::root()?.join(KEPT) } else { args.out };
    fs::write(&out, draw(&result, &args.caption)?)
        .with_context(|| format!("writing {}", out.display()))?;
    println!("drawn: {}", out.display());
    Ok(true)
}

/// Takes IOPS or latency out of both.
type Pick = fn(&(f64, f64)) -> f64;

/// IOPS and median latency in microseconds, by kind of request, side and depth.
#[derive(Debug, Default, PartialEq)]
struct Figures {
    kinds: Vec<String>,
    depths: Vec<u32>,
    of: BTreeMap<(String, String, u32), (f64, f64)>,
}

impl Figures {
    fn parse(rows: &Value) -> Result<Figures> {
        let rows = rows.as_array().context("it is no list")?;
        let mut found = Figures::default();
        for row in rows {
            let (Some(point), Some(side)) = (row["point"].as_str(), row["side"].as_str()) else {
                bail!("a row without point and side: {row}");
            };
            let (kind, depth) = point
                .rsplit_once("-qd")
                .and_then(|(kind, depth)| Some((kind.to_owned(), depth.parse::<u32>().ok()?)))
                .with_context(|| format!("{point:?} names no depth"))?;
            let figure = |name: &str| {
                let value = row["figures"][name].as_f64().filter(|v| v.is_finite() && *v > 0.0);
                value.with_context(|| format!("{point}, {side}: no {name}"))
            };
            let figures = (figure("iops")?, figure("p50_us")?);
            if !found.kinds.contains(&kind) {
                found.kinds.push(kind.clone());
            }
            if !found.depths.contains(&depth) {
                found.depths.push(depth);
            }
            found.of.insert((kind, side.to_owned(), depth), figures);
        }
        ensure!(!found.of.is_empty(), "it is empty");
        found.depths.sort_unstable();
        Ok(found)
    }

    /// The values of one line: place of the depth, value.
    fn line(&self, kind: &str, side: &str, value: Pick) -> Vec<(f64, f64)> {
        let at = |(n, depth): (usize, &u32)| {
            let found = self.of.get(&(kind.to_owned(), side.to_owned(), *depth))?;
            Some((n as f64, value(found)))
        };
        self.depths.iter().enumerate().filter_map(at).collect()
    }

    /// What all panels of a row show: from a little below the smallest to a little above the largest.
    fn range(&self, value: Pick) -> std::ops::Range<f64> {
        let (low, high) = self
            .of
            .values()
            .map(value)
            .fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)));
        low / 1.5..high * 1.5
    }
}

/// The picture as SVG.
fn draw(figures: &Figures, caption: &str) -> Result<String> {
    let mut svg = String::new();
    paint(figures, caption, &mut svg).map_err(|error| anyhow::anyhow!("drawing: {error}"))?;
    Ok(svg)
}

fn paint(
    figures: &Figures,
    caption: &str,
    svg: &mut String,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let title = match caption {
        "" => "Null volume over loopback, one core for each side".to_owned(),
        caption => format!("Null volume over loopback, one core for each side: {caption}"),
    };
    let root = root.titled(&title, ("sans-serif", 18))?;
    let panels = root.split_evenly((2, figures.kinds.len()));
    let rows: [(&str, Pick); 2] = [("requests a second", |f| f.0), ("median latency, us", |f| f.1)];
    for (row, (words, value)) in rows.into_iter().enumerate() {
        for (column, kind) in figures.kinds.iter().enumerate() {
            let area = &panels[row * figures.kinds.len() + column];
            let across = -0.3..figures.depths.len() as f64 - 0.7;
            let mut chart = ChartBuilder::on(area)
                .caption(format!("{kind}: {words}"), ("sans-serif", 15))
                .margin(8)
                .x_label_area_size(34)
                .y_label_area_size(56)
                .build_cartesian_2d(across, figures.range(value).log_scale())?;
            chart
                .configure_mesh()
                .disable_x_mesh()
                .light_line_style(WHITE)
                .x_labels(figures.depths.len() + 1)
                .x_label_formatter(&|x| depth_label(&figures.depths, *x))
                .y_label_formatter(&|y| short(*y))
                .x_desc("depth")
                .draw()?;
            for (side, colour) in SIDES {
                let line = figures.line(kind, side, value);
                if line.is_empty() {
                    continue;
                }
                let style = colour.stroke_width(2);
                chart
                    .draw_series(LineSeries::new(line.clone(), style))?
                    .label(*side)
                    .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], style));
                chart.draw_series(line.iter().map(|at| Circle::new(*at, 3, colour.filled())))?;
            }
            if (row, column) == (0, 0) {
                chart
                    .configure_series_labels()
                    .position(SeriesLabelPosition::LowerRight)
                    .background_style(WHITE.mix(0.8))
                    .draw()?;
            }
        }
    }
    root.present()?;
    Ok(())
}

/// The depth at a place, where one is.
fn depth_label(depths: &[u32], at: f64) -> String {
    let nearest = at.round();
    if (at - nearest).abs() > 0.01 || nearest < 0.0 {
        return String::new();
    }
    depths.get(nearest as usize).map(ToString::to_string).unwrap_or_default()
}

/// `1.5 M`, `120 k`, `8.1`.
fn short(value: f64) -> String {
    let (value, unit) = match value {
        v if v >= 1e6 => (v / 1e6, " M"),
        v if v >= 1e3 => (v / 1e3, " k"),
        v => (v, ""),
    };
    let digits = if value < 10.0 && value.fract() > 0.01 { 1 } else { 0 };
    format!("{value:.digits$}{unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result() -> Value {
        let mut rows = Vec::new();
        for kind in ["read-4k", "write-128k"] {
            for (side, share) in [("bare loop", 1.0), ("plain", 0.9), ("TLS AES-128", 0.5)] {
                for (depth, iops) in [(1, 100e3), (32, 1e6), (128, 1.5e6)] {
                    rows.push(serde_json::json!({ "point": format!("{kind}-qd{depth}"),
                        "side": side, "goals": [],
                        "figures": { "iops": iops * share, "low": 1.0, "high": 2.0,
                            "p50_us": f64::from(depth) * 1e6 / iops / share, "p99_us": 99.0 } }));
                }
            }
        }
        Value::Array(rows)
    }

    #[test]
    fn every_side_and_kind_is_drawn() {
        let figures = Figures::parse(&result()).unwrap();
        assert_eq!(figures.depths, [1, 32, 128]);
        assert_eq!(figures.line("read-4k", "plain", |f| f.0)[2], (2.0, 1.35e6));
        let svg = draw(&figures, "a machine").unwrap();
        for part in [
            "bare loop",
            "plain",
            "TLS AES-128",
            "read-4k: requests a second",
            "write-128k: median latency, us",
            "a machine",
        ] {
            assert!(svg.contains(part), "{part}");
        }
        // Two rows of two panels, three lines each, three points each.
        let marks = svg.matches("<circle").count();
        assert_eq!(marks, 2 * 2 * 3 * 3);
    }

    #[test]
    fn what_is_no_result_is_refused_with_the_reason() {
        for (rows, reason) in [
            (serde_json::json!({}), "no list"),
            (serde_json::json!([]), "empty"),
            (serde_json::json!([{ "point": "read-4k-qd1" }]), "without point and side"),
            (serde_json::json!([{ "point": "read", "side": "plain" }]), "names no depth"),
            (
                serde_json::json!([{ "point": "read-4k-qd1", "side": "plain",
                    "figures": { "iops": 0, "p50_us": 1 } }]),
                "no iops",
            ),
        ] {
            let error = Figures::parse(&rows).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn values_are_short() {
        assert_eq!(short(1.5e6), "1.5 M");
        assert_eq!(short(2e6), "2 M");
        assert_eq!(short(120e3), "120 k");
        assert_eq!(short(8.13), "8.1");
        assert_eq!(depth_label(&[1, 32], 1.0), "32");
        assert_eq!(depth_label(&[1, 32], 0.5), "");
        assert_eq!(depth_label(&[1, 32], -1.0), "");
    }
}
