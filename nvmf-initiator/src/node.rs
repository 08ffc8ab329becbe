//! The NUMA node that the calling thread runs on.

use std::fs;

/// The node of the processor that the thread was last seen on, which is where it stays if it is
/// pinned; `None` where nothing is known of nodes. For set-up: reads files.
pub(crate) fn this_node() -> Option<u32> {
    let stat = fs::read_to_string("/proc/thread-self/stat").ok()?;
    let cpu = processor(&stat)?;
    let entries = fs::read_dir(format!("/sys/devices/system/cpu/cpu{cpu}")).ok()?;
    entries
        .filter_map(Result::ok)
        .find_map(|entry| entry.file_name().to_str()?.strip_prefix("node")?.parse().ok())
}

/// Field 39 of a thread's `stat`; the second is a name in parentheses that may hold anything.
fn processor(stat: &str) -> Option<u32> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(36)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_is_found_whatever_the_thread_is_called() {
        let fields: Vec<String> = (3..=52).map(|field| field.to_string()).collect();
        let stat = format!("1 (a ) (b) {}", fields.join(" "));
        assert_eq!(processor(&stat), Some(39));
        assert_eq!(processor("1 (x) S"), None);
        let own = fs::read_to_string("/proc/thread-self/stat").expect("Linux");
        assert!(processor(&own).is_some());
    }
}
