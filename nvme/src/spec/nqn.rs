//! NVMe Qualified Names.

use core::fmt;
use core::str::FromStr;

/// Well-known NQN of the discovery subsystem (NVMe Base 2.0, "Unique Identifier").
pub const DISCOVERY_NQN: &str = "nqn.2014-08.org.nvmexpress.discovery";

/// Longest NQN in bytes, without the terminating NUL of a wire field.
pub const NQN_LEN_MAX: usize = 223;

/// Size of an NQN field on the wire.
pub const NQN_FIELD_LEN: usize = 256;

/// A validated NVMe Qualified Name.
///
/// Two forms exist (NVMe Base 2.0, "NVMe Qualified Names"): `nqn.yyyy-mm.reverse-domain:string`
/// and `nqn.2014-08.org.nvmexpress:uuid:UUID`. Accepted here: UTF-8 of 12 to 223 bytes, prefix
/// `nqn.`, a year and month, a dot, and no control character or space. Deployed hosts write
/// more than the grammar (underscores in the domain, upper-case UUIDs), so it stops there.
///
/// ```
/// let nqn: nvme::spec::Nqn = "nqn.2014-08.org.nvmexpress.discovery".parse().unwrap();
/// assert!(nqn.is_discovery());
/// assert!("iqn.2014-08.org.example:x".parse::<nvme::spec::Nqn>().is_err());
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nqn(Box<str>);

/// Why a string is no NQN.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum InvalidNqn {
    /// Not 12 to 223 bytes.
    #[error("an NQN is 12 to {NQN_LEN_MAX} bytes long, this is {0}")]
    Length(usize),
    /// Does not begin with `nqn.yyyy-mm.`.
    #[error(
        "an NQN begins with \"nqn.yyyy-mm.\" (year and month), for example nqn.2024-01.com.example:disk0"
    )]
    Prefix,
    /// A control character, a space, or bytes that are not UTF-8.
    #[error("an NQN is UTF-8 without control characters and spaces")]
    Character,
    /// A wire field without a terminating NUL or with bytes behind it.
    #[error("the NQN field is not a NUL-terminated string")]
    NotTerminated,
}

impl Nqn {
    /// Checks and takes a string.
    ///
    /// # Errors
    /// [`InvalidNqn`] says which rule it breaks.
    pub fn new(text: &str) -> Result<Nqn, InvalidNqn> {
        if !(12..=NQN_LEN_MAX).contains(&text.len()) {
            return Err(InvalidNqn::Length(text.len()));
        }
        let head = text.as_bytes();
        let date_ok = head.starts_with(b"nqn.")
            && head[4..8].iter().all(u8::is_ascii_digit)
            && head[8] == b'-'
            && matches!(&head[9..11], [b'0', b'1'..=b'9'] | [b'1', b'0'..=b'2'])
            && head[11] == b'.';
        if !date_ok || text.len() == 12 {
            return Err(InvalidNqn::Prefix);
        }
        if text.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return Err(InvalidNqn::Character);
        }
        Ok(Nqn(text.into()))
    }

    /// From a 256-byte wire field: a NUL-terminated string; what follows the NUL is ignored
    /// ("null-terminated" is all the specification asks).
    ///
    /// # Errors
    /// [`InvalidNqn`] when it is not terminated, not UTF-8 or not an NQN.
    pub fn from_field(field: &[u8; NQN_FIELD_LEN]) -> Result<Nqn, InvalidNqn> {
        let len = field.iter().position(|&b| b == 0).ok_or(InvalidNqn::NotTerminated)?;
        Nqn::new(str::from_utf8(&field[..len]).map_err(|_| InvalidNqn::Character)?)
    }

    /// As a 256-byte wire field.
    #[must_use]
    pub fn to_field(&self) -> [u8; NQN_FIELD_LEN] {
        let mut field = [0; NQN_FIELD_LEN];
        field[..self.0.len()].copy_from_slice(self.0.as_bytes());
        field
    }

    /// The well-known discovery NQN.
    #[must_use]
    pub fn discovery() -> Nqn {
        Nqn(DISCOVERY_NQN.into())
    }

    /// Whether this is the well-known discovery NQN.
    #[must_use]
    pub fn is_discovery(&self) -> bool {
        &*self.0 == DISCOVERY_NQN
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Nqn {
    type Err = InvalidNqn;
    fn from_str(text: &str) -> Result<Nqn, InvalidNqn> {
        Nqn::new(text)
    }
}

impl AsRef<str> for Nqn {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Nqn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Nqn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_what_hosts_send() {
        for text in [
            "nqn.2014-08.org.nvmexpress:uuid:1b4e28ba-2fa1-11d2-883f-0016d3cca427",
            DISCOVERY_NQN,
            "nqn.2024-01.io.penstock:db0",
            "nqn.2019-12.com.Example_1.sub:a:b/c",
        ] {
            let nqn = Nqn::new(text).unwrap();
            assert_eq!(Nqn::from_field(&nqn.to_field()).unwrap(), nqn);
            assert_eq!(nqn.as_str(), text);
        }
        assert!(Nqn::new(&format!("nqn.2014-08.{}", "x".repeat(223 - 12))).is_ok());
    }

    #[test]
    fn refuses_and_says_why() {
        let long = format!("nqn.2014-08.{}", "x".repeat(224 - 12));
        for (text, error) in [
            ("", InvalidNqn::Length(0)),
            (long.as_str(), InvalidNqn::Length(224)),
            ("nqn.2014-08.", InvalidNqn::Prefix),
            ("nqn.2014-13.org.x", InvalidNqn::Prefix),
            ("nqn.2014-00.org.x", InvalidNqn::Prefix),
            ("iqn.2014-08.org.x", InvalidNqn::Prefix),
            ("nqn.2014-08.org.x y", InvalidNqn::Character),
            ("nqn.2014-08.org.x\n", InvalidNqn::Character),
        ] {
            assert_eq!(Nqn::new(text).unwrap_err(), error, "{text:?}");
        }
        assert_eq!(Nqn::from_field(&[b'n'; 256]).unwrap_err(), InvalidNqn::NotTerminated);
        let mut field = [0; 256];
        field[..13].copy_from_slice(b"nqn.2014-08.\xff");
        assert_eq!(Nqn::from_field(&field).unwrap_err(), InvalidNqn::Character);
    }
}
