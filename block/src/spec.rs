//! Naming a volume in one string: what a configuration file or a command line says.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use crate::null::NullVolume;
use crate::ram::RamVolume;
use crate::uring::{FileOptions, FileVolume};
use crate::volume::{Identity, Volume};

/// Largest volume: what a file offset can name.
const BYTES_MAX: u64 = i64::MAX as u64 & !4095;

/// A volume that could be opened.
///
/// | text | meaning |
/// |---|---|
/// | `file:PATH[,size=SIZE][,block=512\|4096][,ro][,poll]` | a file; made with `SIZE` if there is none |
/// | `blockdev:PATH[,block=512\|4096][,ro][,poll]` | a block device that nobody else uses |
/// | `ram:SIZE[,block=512\|4096]` | memory, lost at exit |
/// | `null:SIZE[,block=512\|4096]` | nothing: writes are dropped, reads give zeros |
///
/// `SIZE` is a number of bytes, or a number with `K`, `M`, `G`, `T` or `P` (powers of 1024; `KiB`
/// to `PiB` mean the same). A comma in `PATH` is written twice. `poll` asks the device for finished
/// reads and writes instead of waiting for its interrupts; a device without queues for that is
/// refused.
///
/// ```
/// let spec: block::VolumeSpec = "file:/srv/db0.img,size=64GiB".parse()?;
/// assert_eq!(spec.to_string(), "file:/srv/db0.img,size=64G");
/// let error = "ram:64 lots".parse::<block::VolumeSpec>().unwrap_err().to_string();
/// assert!(error.contains("`64 lots`"));
/// # Ok::<(), block::SpecError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeSpec {
    kind: Kind,
    block_bytes: Option<u32>,
    read_only: bool,
    poll: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    File { path: PathBuf, bytes: Option<u64> },
    BlockDevice { path: PathBuf },
    Ram { bytes: u64 },
    Null { bytes: u64 },
}

/// A volume specification that makes no sense. Says which part, its value and what is allowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SpecError(String);

/// A volume could not be opened. Says which, why and what to do.
#[derive(Debug, thiserror::Error)]
#[error("volume {spec}: {reason}")]
pub struct OpenError {
    /// The specification, as text.
    pub spec: String,
    /// What was wrong with the backing object.
    pub reason: String,
    /// The system's error, where there was one.
    #[source]
    pub source: Option<io::Error>,
}

impl OpenError {
    pub(crate) fn new(reason: impl Into<String>) -> OpenError {
        OpenError { spec: String::new(), reason: reason.into(), source: None }
    }

    pub(crate) fn io(reason: impl Into<String>, source: io::Error) -> OpenError {
        OpenError { source: Some(source), ..OpenError::new(reason) }
    }
}

impl VolumeSpec {
    /// Opens the volume; a file that is not there is made, if a size is given.
    ///
    /// Blocks, for some seconds if a process that had the volume has just been killed: the kernel
    /// finishes its I/O first. For the control plane only.
    pub fn open(&self, identity: Identity) -> Result<Arc<dyn Volume>, OpenError> {
        self.open_kind(identity, false).map_err(|e| OpenError { spec: self.to_string(), ..e })
    }

    /// The same for a device, which leaves compare and write to its volume: one in memory, or of
    /// nothing, can do it.
    pub fn open_for_device(&self, identity: Identity) -> Result<Arc<dyn Volume>, OpenError> {
        self.open_kind(identity, true).map_err(|e| OpenError { spec: self.to_string(), ..e })
    }

    /// Whether it is there for measuring and trying only: memory or nothing, no file of the system.
    pub fn is_ephemeral(&self) -> bool {
        matches!(self.kind, Kind::Ram { .. } | Kind::Null { .. })
    }

    fn open_kind(&self, identity: Identity, has_pairs: bool) -> Result<Arc<dyn Volume>, OpenError> {
        let block_bytes = self.block_bytes.unwrap_or(512);
        let options = FileOptions {
            size_bytes: None,
            block_bytes: self.block_bytes,
            read_only: self.read_only,
            poll: self.poll,
            ..FileOptions::default()
        };
        Ok(match &self.kind {
            Kind::File { path, bytes } => {
                let options = FileOptions { size_bytes: *bytes, ..options };
                Arc::new(FileVolume::open(path, identity, &options)?)
            }
            Kind::BlockDevice { path } => {
                Arc::new(FileVolume::open_device(path, identity, &options)?)
            }
            Kind::Ram { bytes } => {
                let volume = RamVolume::new(identity, *bytes, block_bytes)
                    .map_err(|e| OpenError::io("cannot reserve the address space", e))?;
                Arc::new(if has_pairs { volume.with_compare_and_write() } else { volume })
            }
            Kind::Null { bytes } => Arc::new(NullVolume::new(identity, *bytes, block_bytes)),
        })
    }

    /// The path of a file or block device.
    pub fn path(&self) -> Option<&Path> {
        match &self.kind {
            Kind::File { path, .. } | Kind::BlockDevice { path } => Some(path),
            Kind::Ram { .. } | Kind::Null { .. } => None,
        }
    }

    /// Whether contents survive the process.
    pub fn is_persistent(&self) -> bool {
        self.path().is_some()
    }

    fn new(kind: Kind) -> VolumeSpec {
        VolumeSpec { kind, block_bytes: None, read_only: false, poll: false }
    }
}

impl FromStr for VolumeSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<VolumeSpec, SpecError> {
        let kinds = "allowed are file:PATH, blockdev:PATH, ram:SIZE and null:SIZE";
        let (kind, rest) = text
            .split_once(':')
            .ok_or_else(|| SpecError(format!("volume `{text}` does not say its kind; {kinds}")))?;
        let (object, options) = split(rest);
        let mut spec = match kind {
            "file" | "blockdev" if object.is_empty() => {
                return Err(SpecError(format!("volume `{text}` has no path; write {kind}:PATH")));
            }
            "file" | "blockdev" if object.contains('\0') => {
                return Err(SpecError(format!("volume `{text}`: a path has no NUL byte")));
            }
            "file" => VolumeSpec::new(Kind::File { path: PathBuf::from(&object), bytes: None }),
            "blockdev" => VolumeSpec::new(Kind::BlockDevice { path: PathBuf::from(&object) }),
            "ram" => VolumeSpec::new(Kind::Ram { bytes: parse_size(&object)? }),
            "null" => VolumeSpec::new(Kind::Null { bytes: parse_size(&object)? }),
            _ => return Err(SpecError(format!("unknown kind of volume `{kind}`; {kinds}"))),
        };
        let mut seen = Vec::new();
        for option in &options {
            let (name, value) = match option.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (option.as_str(), None),
            };
            if seen.contains(&name) {
                return Err(SpecError(format!("option `{name}` is given twice")));
            }
            seen.push(name);
            match (name, value, &mut spec.kind) {
                ("size", Some(value), Kind::File { bytes, .. }) => {
                    *bytes = Some(parse_size(value)?)
                }
                ("block", Some("512"), _) => spec.block_bytes = Some(512),
                ("block", Some("4096"), _) => spec.block_bytes = Some(4096),
                ("block", _, _) => {
                    return Err(SpecError(format!(
                        "`{option}` is not a block size; allowed are block=512 and block=4096"
                    )));
                }
                ("ro", None, Kind::File { .. } | Kind::BlockDevice { .. }) => {
                    spec.read_only = true;
                }
                ("poll", None, Kind::File { .. } | Kind::BlockDevice { .. }) => spec.poll = true,
                (_, _, kind) => {
                    let allowed = match kind {
                        Kind::File { .. } => "size=SIZE, block=512|4096, ro and poll",
                        Kind::BlockDevice { .. } => "block=512|4096, ro and poll",
                        Kind::Ram { .. } | Kind::Null { .. } => "block=512|4096",
                    };
                    return Err(SpecError(format!(
                        "unknown option `{option}`; allowed here: {allowed} (a comma in a path is \
                         written twice)"
                    )));
                }
            }
        }
        spec.check_size()?;
        Ok(spec)
    }
}

impl VolumeSpec {
    fn check_size(&self) -> Result<(), SpecError> {
        let bytes = match &self.kind {
            Kind::File { bytes, .. } => *bytes,
            Kind::BlockDevice { .. } => None,
            Kind::Ram { bytes } | Kind::Null { bytes } => Some(*bytes),
        };
        let Some(bytes) = bytes else { return Ok(()) };
        let block = u64::from(self.block_bytes.unwrap_or(512));
        if bytes == 0 {
            return Err(SpecError("size 0 is no volume; at least one block is needed".to_owned()));
        }
        if !bytes.is_multiple_of(block) {
            return Err(SpecError(format!(
                "size {bytes} is not a multiple of the block size of {block} bytes"
            )));
        }
        Ok(())
    }
}

/// The object, with doubled commas made single, and the options.
fn split(text: &str) -> (String, Vec<String>) {
    let mut parts = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(c);
        }
    }
    let options = parts.split_off(1);
    (parts.concat(), options)
}

const UNITS: [(&str, u32); 5] = [("k", 10), ("m", 20), ("g", 30), ("t", 40), ("p", 50)];

/// Bytes from a text like `4096`, `64M` or `1GiB`.
fn parse_size(text: &str) -> Result<u64, SpecError> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let unit = unit.to_ascii_lowercase();
    let shift = match unit.strip_suffix("ib").unwrap_or(&unit) {
        "" if unit.is_empty() => Some(0),
        letter => UNITS.iter().find(|(name, _)| *name == letter).map(|(_, shift)| *shift),
    };
    let (Some(shift), false) = (shift, number.is_empty()) else {
        return Err(SpecError(format!(
            "`{text}` is not a size; allowed is a number of bytes, or a number followed by K, M, G, \
             T or P (powers of 1024; KiB to PiB mean the same)"
        )));
    };
    let bytes = number.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift));
    bytes.filter(|b| *b <= BYTES_MAX).ok_or_else(|| {
        SpecError(format!("size `{text}` is too large; the largest volume has {BYTES_MAX} bytes"))
    })
}

/// The size in the largest unit that gives a whole number.
struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, shift) in UNITS.iter().rev() {
            if self.0 != 0 && self.0.trailing_zeros() >= *shift {
                return write!(f, "{}{}", self.0 >> shift, unit.to_ascii_uppercase());
            }
        }
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for VolumeSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let escaped = |path: &Path| path.display().to_string().replace(',', ",,");
        match &self.kind {
            Kind::File { path, bytes } => {
                write!(f, "file:{}", escaped(path))?;
                if let Some(bytes) = bytes {
                    write!(f, ",size={}", Size(*bytes))?;
                }
            }
            Kind::BlockDevice { path } => write!(f, "blockdev:{}", escaped(path))?,
            Kind::Ram { bytes } => write!(f, "ram:{}", Size(*bytes))?,
            Kind::Null { bytes } => write!(f, "null:{}", Size(*bytes))?,
        }
        if let Some(block) = self.block_bytes {
            write!(f, ",block={block}")?;
        }
        if self.read_only {
            f.write_str(",ro")?;
        }
        if self.poll {
            f.write_str(",poll")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn spec(text: &str) -> VolumeSpec {
        text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
    }

    #[test]
    fn what_is_written_is_meant() {
        for (text, kind) in [
            ("ram:64M", Kind::Ram { bytes: 64 << 20 }),
            ("ram:1GiB", Kind::Ram { bytes: 1 << 30 }),
            ("null:2tib", Kind::Null { bytes: 2 << 40 }),
            ("null:512", Kind::Null { bytes: 512 }),
            ("file:a:b", Kind::File { path: "a:b".into(), bytes: None }),
            ("file:/x,,y,size=1k", Kind::File { path: "/x,y".into(), bytes: Some(1024) }),
            ("file:/x,,,size=1k", Kind::File { path: "/x,".into(), bytes: Some(1024) }),
            ("blockdev:/dev/vdb", Kind::BlockDevice { path: "/dev/vdb".into() }),
        ] {
            assert_eq!(spec(text), VolumeSpec::new(kind), "{text}");
        }
        let full = spec("file:/a,size=8K,block=4096,ro,poll");
        assert_eq!((full.block_bytes, full.read_only, full.poll), (Some(4096), true, true));
        assert_eq!(full.to_string(), "file:/a,size=8K,block=4096,ro,poll");
    }

    #[test]
    fn refusals_name_the_value_and_what_is_allowed() {
        for (text, want) in [
            ("", "volume `` does not say its kind; allowed are file:PATH"),
            ("/dev/sda", "volume `/dev/sda` does not say its kind"),
            ("disk:/x", "unknown kind of volume `disk`; allowed are"),
            ("file:", "has no path; write file:PATH"),
            ("blockdev:,ro", "has no path; write blockdev:PATH"),
            ("file:/a\0b", "no NUL byte"),
            ("ram:", "`` is not a size; allowed is"),
            ("ram:M", "`M` is not a size"),
            ("ram:12GB", "`12GB` is not a size"),
            ("ram:1iB", "`1iB` is not a size"),
            ("ram:-1", "`-1` is not a size"),
            ("ram:1.5G", "`1.5G` is not a size"),
            ("ram:0", "size 0 is no volume"),
            ("ram:1000", "size 1000 is not a multiple of the block size of 512 bytes"),
            ("ram:512,block=4096", "size 512 is not a multiple of the block size of 4096 bytes"),
            ("ram:8192P", "size `8192P` is too large; the largest volume has"),
            ("null:99999999999999999999", "is too large"),
            ("ram:1M,size=2M", "unknown option `size=2M`; allowed here: block=512|4096"),
            ("ram:1M,ro", "unknown option `ro`"),
            ("ram:1M,poll", "unknown option `poll`"),
            ("file:/a,poll=1", "unknown option `poll=1`"),
            ("file:/a,siz=1M", "unknown option `siz=1M`; allowed here: size=SIZE"),
            ("file:/a,size=1M,size=1M", "option `size` is given twice"),
            ("file:/a,block=1024", "`block=1024` is not a block size; allowed are block=512"),
            ("file:/a,block", "`block` is not a block size"),
            ("file:/a,ro=1", "unknown option `ro=1`"),
            ("file:/a,", "unknown option ``"),
        ] {
            let message = text.parse::<VolumeSpec>().unwrap_err().to_string();
            assert!(message.contains(want), "{text}: {message}");
        }
    }

    fn any_spec() -> impl Strategy<Value = VolumeSpec> {
        let size = || (1..1u64 << 40, 0..3u32).prop_map(|(n, s)| (n << (10 * s)) & !4095);
        let size = move || size().prop_map(|n| n.clamp(4096, BYTES_MAX));
        let path = || "[^\0]{1,30}";
        let kind = prop_oneof![
            (path(), proptest::option::of(size()))
                .prop_map(|(p, bytes)| Kind::File { path: p.into(), bytes }),
            path().prop_map(|p| Kind::BlockDevice { path: p.into() }),
            size().prop_map(|bytes| Kind::Ram { bytes }),
            size().prop_map(|bytes| Kind::Null { bytes }),
        ];
        let block = prop_oneof![Just(None), Just(Some(512)), Just(Some(4096))];
        (kind, block, any::<(bool, bool)>()).prop_map(|(kind, block_bytes, (ro, poll))| {
            let is_path = matches!(kind, Kind::File { .. } | Kind::BlockDevice { .. });
            VolumeSpec { kind, block_bytes, read_only: ro && is_path, poll: poll && is_path }
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn display_parses_back(spec in any_spec()) {
            prop_assert_eq!(spec.to_string().parse::<VolumeSpec>(), Ok(spec));
        }

        #[test]
        fn any_text_gives_a_spec_or_a_message(text in "\\PC{0,40}", kind in 0..5usize) {
            let kind = ["", "file:", "blockdev:", "ram:", "null:"][kind];
            if let Err(e) = format!("{kind}{text}").parse::<VolumeSpec>() {
                prop_assert!(e.to_string().len() > 10);
            }
        }

        #[test]
        fn sizes_parse_back(bytes in 1..=BYTES_MAX) {
            prop_assert_eq!(parse_size(&Size(bytes).to_string()), Ok(bytes));
        }
    }
}
