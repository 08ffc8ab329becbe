//! Base64 (RFC 4648, section 4), strict: padding is required, stray bits and characters are
//! refused.

const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Appends the digits for `bytes`.
pub(crate) fn encode(bytes: &[u8], out: &mut String) {
    for chunk in bytes.chunks(3) {
        let byte = |i: usize| u32::from(chunk.get(i).copied().unwrap_or(0));
        let word = byte(0) << 16 | byte(1) << 8 | byte(2);
        for i in 0..4 {
            let digit = DIGITS[(word >> (18 - 6 * i) & 0x3F) as usize];
            out.push(if i <= chunk.len() { char::from(digit) } else { '=' });
        }
    }
}

/// Decodes into `out` and returns the number of bytes; `None` if `text` is not canonical or too
/// long.
pub(crate) fn decode(text: &[u8], out: &mut [u8]) -> Option<usize> {
    if !text.len().is_multiple_of(4) {
        return None;
    }
    let mut len = 0;
    for (n, chunk) in text.chunks(4).enumerate() {
        let is_last = 4 * (n + 1) == text.len();
        let padding = chunk.iter().rev().take_while(|c| **c == b'=').count();
        if padding > 2 || (padding > 0 && !is_last) {
            return None;
        }
        let mut word = 0;
        for c in &chunk[..4 - padding] {
            word = word << 6 | digit(*c)?;
        }
        word <<= 6 * padding;
        let bytes = word.to_be_bytes();
        let (kept, rest) = bytes[1..].split_at(3 - padding);
        if rest.iter().any(|b| *b != 0) {
            return None;
        }
        out.get_mut(len..len + kept.len())?.copy_from_slice(kept);
        len += kept.len();
    }
    Some(len)
}

fn digit(c: u8) -> Option<u32> {
    Some(u32::from(match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return None,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 4648, section 10.
    #[test]
    fn vectors() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            let mut encoded = String::new();
            encode(bytes.as_bytes(), &mut encoded);
            assert_eq!(encoded, text);
            let mut decoded = [0; 8];
            let len = decode(text.as_bytes(), &mut decoded).unwrap();
            assert_eq!(&decoded[..len], bytes.as_bytes());
        }
    }

    #[test]
    fn refusals() {
        for text in ["Z", "Zg", "Zg=", "Zg===", "Zh==", "Zm9=", "====", "Zg==Zg==", "Zm 9", "Zm9-"]
        {
            assert_eq!(decode(text.as_bytes(), &mut [0; 16]), None, "{text}");
        }
        assert_eq!(decode(b"Zm9v", &mut [0; 2]), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn round_trip(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let mut text = String::new();
            encode(&bytes, &mut text);
            let mut back = [0; 80];
            let len = decode(text.as_bytes(), &mut back).unwrap();
            prop_assert_eq!(&back[..len], &bytes[..]);
        }

        /// Whatever decodes is what would have been encoded.
        #[test]
        fn canonical(text in "[A-Za-z0-9+/=]{0,12}") {
            let mut bytes = [0; 16];
            if let Some(len) = decode(text.as_bytes(), &mut bytes) {
                let mut again = String::new();
                encode(&bytes[..len], &mut again);
                prop_assert_eq!(again, text);
            }
        }
    }
}
