//! Sizes as people write them.

/// Parses a number of bytes, or a number with `K`, `M`, `G`, `T` or `P` (powers of 1024; `KiB` to
/// `PiB` mean the same). `Err` says what is allowed.
pub fn parse(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" => Some(0),
        "k" | "kib" => Some(10),
        "m" | "mib" => Some(20),
        "g" | "gib" => Some(30),
        "t" | "tib" => Some(40),
        "p" | "pib" => Some(50),
        _ => None,
    };
    let value = number.parse::<u64>().ok().zip(shift);
    value
        .and_then(|(number, shift)| number.checked_mul(1 << shift))
        .filter(|bytes| *bytes != 0)
        .ok_or_else(|| {
            "allowed: a number of bytes, or with K, M, G, T or P (powers of 1024), such as 10GiB"
                .to_owned()
        })
}

/// `1 GiB` where it is that exactly, otherwise with one decimal.
pub fn show(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut unit = 0;
    while unit + 1 < UNITS.len() && bytes >> (10 * (unit + 1)) != 0 {
        unit += 1;
    }
    let scale = 1u64 << (10 * unit);
    if bytes.is_multiple_of(scale) {
        format!("{} {}", bytes / scale, UNITS[unit])
    } else {
        format!("{:.1} {}", bytes as f64 / scale as f64, UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_people_write() {
        for (text, bytes) in [
            ("512", 512),
            ("4k", 4096),
            ("4K", 4096),
            ("4KiB", 4096),
            ("1M", 1 << 20),
            ("10GiB", 10 << 30),
            ("2tib", 2 << 40),
            ("1P", 1 << 50),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_no_size() {
        for text in ["", "0", "K", "-1", "1.5G", "1 G", "4KB", "10 lots", "99999999P", "1e3"] {
            assert!(parse(text).unwrap_err().contains("allowed"), "{text}");
        }
    }

    #[test]
    fn sizes_people_read() {
        assert_eq!(show(1 << 30), "1 GiB");
        assert_eq!(show(64 << 20), "64 MiB");
        assert_eq!(show(1536), "1.5 KiB");
        assert_eq!(show(0), "0 bytes");
        assert_eq!(show(u64::MAX), "16384.0 PiB");
    }
}
