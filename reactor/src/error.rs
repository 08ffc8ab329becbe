//! Errors: small `Copy` types on the hot path, one descriptive type for set-up.

use std::fmt;
use std::io;

/// An error number of the operating system (or of the simulated one).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl Errno {
    /// The operation was cancelled.
    pub const CANCELED: Errno = Errno(libc::ECANCELED);
    /// The peer answered a connect with a reset: nobody listens.
    pub const CONNECTION_REFUSED: Errno = Errno(libc::ECONNREFUSED);
    /// The connection was reset.
    pub const CONNECTION_RESET: Errno = Errno(libc::ECONNRESET);
    /// A deadline passed.
    pub const TIMED_OUT: Errno = Errno(libc::ETIMEDOUT);
    /// The device reported an error.
    pub const IO: Errno = Errno(libc::EIO);
    /// No space is left on the device.
    pub const NO_SPACE: Errno = Errno(libc::ENOSPC);
    /// The operation is not supported by the file.
    pub const NOT_SUPPORTED: Errno = Errno(libc::EOPNOTSUPP);
    /// The peer sent bytes that the record layer refuses.
    pub const BAD_MESSAGE: Errno = Errno(libc::EBADMSG);
    /// The descriptor does not fit the operation or the core.
    pub const BAD_DESCRIPTOR: Errno = Errno(libc::EBADF);
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({}: {})", self.0, io::Error::from_raw_os_error(self.0))
    }
}

impl std::error::Error for Errno {}

impl From<Errno> for io::Error {
    fn from(errno: Errno) -> io::Error {
        io::Error::from_raw_os_error(errno.0)
    }
}

/// No room for another operation now; try again after completions were taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Busy;

impl fmt::Display for Busy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no operation slot is free on this core")
    }
}

impl std::error::Error for Busy {}

/// A bounded queue has no room now (or its core is gone).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the queue is full or its core is gone")
    }
}

impl std::error::Error for Full {}

/// A core could not be set up. The text says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// `io_uring_setup` is not in this kernel (`ENOSYS`).
    #[error(
        "this kernel has no io_uring (ENOSYS): run a Linux kernel >= 6.1 built with CONFIG_IO_URING=y; \
         in a sandbox such as gVisor, run outside it"
    )]
    Missing,
    /// io_uring is switched off, or a sandbox forbids it (`EPERM`).
    #[error(
        "io_uring is forbidden here (EPERM): check `sysctl kernel.io_uring_disabled` (0 allows everyone, 1 only root and \
         kernel.io_uring_group, 2 nobody); in a container, use a seccomp profile that allows io_uring_setup, \
         io_uring_enter and io_uring_register (Docker: --security-opt seccomp=PROFILE.json)"
    )]
    Forbidden,
    /// The kernel does not know a flag or operation that the loop needs.
    #[error("this kernel is too old for {feature}: run Linux >= 6.1")]
    TooOld {
        /// What was missing.
        feature: &'static str,
    },
    /// Memory for the ring could not be locked (`ENOMEM`).
    #[error(
        "not enough memory for the io_uring of a core ({what}, ENOMEM): raise the limit on locked memory \
         (`ulimit -l`, LimitMEMLOCK= in the service) or lower the number of ring entries"
    )]
    Memory {
        /// What was being set up.
        what: &'static str,
    },
    /// The thread could not be bound to its processor.
    #[error(
        "binding a core's thread to processor {cpu}: is it online and in this process's cpuset?"
    )]
    Pin {
        /// The processor asked for.
        cpu: usize,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A setting is out of its range.
    #[error("{setting} = {value} is out of range: {allowed}")]
    Config {
        /// The field of [`CoreConfig`](crate::CoreConfig).
        setting: &'static str,
        /// Its value.
        value: u64,
        /// What is allowed.
        allowed: &'static str,
    },
    /// Anything else.
    #[error("setting up {what}")]
    Other {
        /// What was being set up.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl SetupError {
    /// An error that is not about io_uring.
    pub(crate) fn other(what: &'static str, source: io::Error) -> SetupError {
        SetupError::Other { what, source }
    }

    /// Sorts an error of `io_uring_setup` or `io_uring_register`.
    pub(crate) fn from_ring(what: &'static str, source: io::Error) -> SetupError {
        match source.raw_os_error() {
            Some(libc::ENOSYS) => SetupError::Missing,
            Some(libc::EPERM | libc::EACCES) => SetupError::Forbidden,
            Some(libc::EINVAL) => SetupError::TooOld { feature: what },
            Some(libc::ENOMEM) => SetupError::Memory { what },
            _ => SetupError::Other { what, source },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn setup_errors_say_what_to_do() {
        let text = |errno| {
            SetupError::from_ring("a ring", io::Error::from_raw_os_error(errno)).to_string()
        };
        assert!(text(libc::ENOSYS).contains("CONFIG_IO_URING"));
        assert!(text(libc::EPERM).contains("kernel.io_uring_disabled"));
        assert!(text(libc::EPERM).contains("seccomp"));
        assert!(text(libc::EINVAL).contains(">= 6.1"));
        assert!(text(libc::ENOMEM).contains("ulimit -l"));
        let other = SetupError::from_ring("a ring", io::Error::from_raw_os_error(libc::EMFILE));
        assert!(std::error::Error::source(&other).is_some());
    }

    #[test]
    fn errno_displays_the_systems_words() {
        assert_eq!(
            Errno::NO_SPACE.to_string(),
            io::Error::from_raw_os_error(libc::ENOSPC).to_string()
        );
    }
}
