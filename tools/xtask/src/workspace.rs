//! Where the checkout and its build output are.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result};
use cargo_metadata::{Metadata, MetadataCommand};

/// The cargo that started us, so that a toolchain override holds for every step.
pub(crate) fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// What cargo knows of the workspace, dependencies of dependencies left out.
pub(crate) fn metadata() -> Result<Metadata> {
    MetadataCommand::new().no_deps().exec().context("cannot read `cargo metadata`")
}

/// Root folder of the checkout.
pub(crate) fn root() -> Result<PathBuf> {
    Ok(metadata()?.workspace_root.into_std_path_buf())
}

/// Folder of the build output.
pub(crate) fn target_dir() -> Result<PathBuf> {
    Ok(metadata()?.target_directory.into_std_path_buf())
}
