//! `penstock up`.

use anyhow::Result;

use super::super::Scene;
use crate::report::Outcome;

pub(super) fn run(_scene: &Scene<'_>) -> Result<Outcome> {
    Ok(Outcome::Skipped("not yet".to_owned()))
}
