//! Alert descriptions (RFC 8446, section 6).

use std::fmt;

/// What an alert says. A peer may send any value.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct AlertCode(pub u8);

impl AlertCode {
    /// The orderly end of one direction.
    pub const CLOSE_NOTIFY: AlertCode = AlertCode(0);
    /// A message that may not come now.
    pub const UNEXPECTED_MESSAGE: AlertCode = AlertCode(10);
    /// A record that is not the peer's.
    pub const BAD_RECORD_MAC: AlertCode = AlertCode(20);
    /// A record longer than allowed.
    pub const RECORD_OVERFLOW: AlertCode = AlertCode(22);
    /// No acceptable set of parameters.
    pub const HANDSHAKE_FAILURE: AlertCode = AlertCode(40);
    /// A field out of range.
    pub const ILLEGAL_PARAMETER: AlertCode = AlertCode(47);
    /// A message that does not parse.
    pub const DECODE_ERROR: AlertCode = AlertCode(50);
    /// A proof that does not hold: the keys differ.
    pub const DECRYPT_ERROR: AlertCode = AlertCode(51);
    /// No version that both ends speak.
    pub const PROTOCOL_VERSION: AlertCode = AlertCode(70);
    /// Our own failure.
    pub const INTERNAL_ERROR: AlertCode = AlertCode(80);
    /// The user changed their mind; `close_notify` follows.
    pub const USER_CANCELED: AlertCode = AlertCode(90);
    /// A message without an extension that it has to have.
    pub const MISSING_EXTENSION: AlertCode = AlertCode(109);
    /// No such pre-shared key.
    pub const UNKNOWN_PSK_IDENTITY: AlertCode = AlertCode(115);

    fn name(self) -> &'static str {
        match self.0 {
            0 => "close_notify",
            10 => "unexpected_message",
            20 => "bad_record_mac",
            22 => "record_overflow",
            40 => "handshake_failure",
            42 => "bad_certificate",
            43 => "unsupported_certificate",
            44 => "certificate_revoked",
            45 => "certificate_expired",
            46 => "certificate_unknown",
            47 => "illegal_parameter",
            48 => "unknown_ca",
            49 => "access_denied",
            50 => "decode_error",
            51 => "decrypt_error",
            70 => "protocol_version",
            71 => "insufficient_security",
            80 => "internal_error",
            86 => "inappropriate_fallback",
            90 => "user_canceled",
            109 => "missing_extension",
            110 => "unsupported_extension",
            112 => "unrecognized_name",
            115 => "unknown_psk_identity",
            116 => "certificate_required",
            120 => "no_application_protocol",
            _ => "unknown",
        }
    }

    /// What it most likely means between two ends that share a key.
    fn hint(self) -> Option<&'static str> {
        match self {
            AlertCode::UNKNOWN_PSK_IDENTITY => Some("it has no key of our identity"),
            AlertCode::DECRYPT_ERROR => {
                Some("its key for our identity differs, or was derived in the other way")
            }
            AlertCode::HANDSHAKE_FAILURE => Some("it wants other cipher suites or groups"),
            _ => None,
        }
    }

    /// The alert as a record without protection, as it is sent before there are keys.
    pub(super) fn plain_record(self) -> [u8; 7] {
        [21, 3, 3, 0, 2, 2, self.0]
    }
}

impl fmt::Display for AlertCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name(), self.0)?;
        match self.hint() {
            Some(hint) => write!(f, ": {hint}"),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for AlertCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name(), self.0)
    }
}
