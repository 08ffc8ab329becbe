//! penstock

fn main() {}
