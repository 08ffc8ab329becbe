//! Bytes and texts that must not be seen.

use std::hint::black_box;

use zeroize::Zeroize;

/// Longest secret: the key of a SHA-512 challenge.
pub(crate) const SECRET_BYTES_MAX: usize = 64;

/// A secret of up to 64 bytes.
///
/// Stored in a place of its own that does not move, so that neither moving it nor a list of them that
/// grows leaves a copy behind; wiped on drop. Neither `Debug` nor `Display`, so that it cannot slip
/// into a log:
///
/// ```compile_fail
/// println!("{:?}", crypto::Secret::new(&[1; 32]));
/// ```
#[derive(Clone)]
pub struct Secret {
    bytes: Box<[u8; SECRET_BYTES_MAX]>,
    len: usize,
}

impl Secret {
    /// Copies a secret; `None` if it has more than 64 bytes.
    pub fn new(bytes: &[u8]) -> Option<Secret> {
        let mut secret = Secret { bytes: Box::new([0; SECRET_BYTES_MAX]), len: bytes.len() };
        secret.bytes.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(secret)
    }

    /// The bytes. Keep them out of logs and copies.
    pub fn expose(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Secret {
    fn wipe(&mut self) {
        self.bytes.zeroize();
        self.len.zeroize();
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.wipe();
    }
}

/// Takes the same time wherever the first difference is. The length is no secret.
impl PartialEq for Secret {
    fn eq(&self, other: &Secret) -> bool {
        let mut difference = 0;
        for (a, b) in self.bytes.iter().zip(other.bytes.iter()) {
            // The optimiser cannot know that one difference settles it.
            difference = black_box(difference | (a ^ b));
        }
        self.len == other.len && difference == 0
    }
}

impl Eq for Secret {}

/// A text that contains a secret. Wiped on drop; neither `Debug` nor `Display`.
#[derive(Clone)]
pub struct SecretText(String);

impl SecretText {
    /// `text` should have been made with its final capacity, so that growing left no copies.
    pub(crate) fn new(text: String) -> SecretText {
        SecretText(text)
    }

    /// The text. Keep it out of logs and copies.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl Drop for SecretText {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equality_sees_every_byte_and_the_length() {
        let base = Secret::new(&[7; 48]).unwrap();
        assert!(base == base.clone());
        for at in 0..48 {
            let mut bytes = [7; 48];
            bytes[at] ^= 0x80;
            assert!(base != Secret::new(&bytes).unwrap(), "byte {at}");
        }
        assert!(Secret::new(&[0; 32]).unwrap() != Secret::new(&[0; 48]).unwrap());
        assert!(Secret::new(&[]).unwrap() == Secret::new(&[]).unwrap());
    }

    #[test]
    fn too_long_is_no_secret() {
        assert!(Secret::new(&[1; 64]).is_some());
        assert!(Secret::new(&[1; 65]).is_none());
    }

    #[test]
    fn a_secret_does_not_move_when_its_list_grows() {
        let mut list = vec![Secret::new(&[9; 32]).unwrap()];
        let at = list[0].expose().as_ptr();
        for _ in 0..100 {
            list.push(Secret::new(&[1; 32]).unwrap());
        }
        assert_eq!(list.remove(0).expose().as_ptr(), at);
    }

    #[test]
    fn wiping_wipes() {
        let mut secret = Secret::new(&[9; 32]).unwrap();
        secret.wipe();
        assert_eq!((secret.len, *secret.bytes), (0, [0; 64]));
    }
}
