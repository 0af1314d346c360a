//! Sizes as people write them: `512M`, `2G`.

use std::fmt;
use std::str::FromStr;

/// A number of bytes, written with a binary unit: K, M, G or T (optionally followed by `iB` or `B`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(u64);

impl Size {
    /// A size of `mib` MiB.
    pub const fn mib(mib: u32) -> Self {
        Self((mib as u64) << 20)
    }

    /// A size of `bytes`.
    pub const fn of_bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// The size in whole MiB, rounded down.
    pub const fn whole_mib(self) -> u64 {
        self.0 >> 20
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not a size; write a number and a unit, such as 512M or 2G");
        let digits_end = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let (digits, unit) = text.split_at(digits_end);
        let shift = match unit.to_ascii_uppercase().trim_end_matches("IB").trim_end_matches('B') {
            "K" => 10,
            "M" => 20,
            "G" => 30,
            "T" => 40,
            _ => return Err(wrong()),
        };
        let number: u64 = digits.parse().map_err(|_| wrong())?;
        match number.checked_mul(1 << shift) {
            Some(0) => Err(format!("`{text}` is no memory at all; write a size such as 512M")),
            Some(bytes) => Ok(Self(bytes)),
            None => Err(format!("`{text}` does not fit in 64 bits; write a size such as 512M")),
        }
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.0 >> shift << shift == self.0 && self.0 != 0 {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [("64K", 64 << 10), ("512M", 512 << 20), ("2G", 2 << 30), ("1T", 1 << 40)] {
            assert_eq!(text.parse::<Size>().unwrap().bytes(), bytes, "{text}");
        }
        assert_eq!("2g".parse::<Size>(), Ok(Size::mib(2048)));
        assert_eq!("2GiB".parse::<Size>(), Ok(Size::mib(2048)));
        assert_eq!("2GB".parse::<Size>(), Ok(Size::mib(2048)));
    }

    #[test]
    fn what_is_no_size_is_named() {
        for text in ["", "M", "12", "12X", "-1G", "1.5G", "G2", "0M", "99999999999G", "1 G", "2GiBB2", "ü"] {
            let error = text.parse::<Size>().unwrap_err();
            assert!(error.starts_with(&format!("`{text}`")), "{error}");
        }
    }

    #[test]
    fn a_size_is_shown_in_its_largest_whole_unit() {
        assert_eq!(Size::mib(2048).to_string(), "2G");
        assert_eq!(Size::mib(1536).to_string(), "1536M");
        assert_eq!("64K".parse::<Size>().unwrap().to_string(), "64K");
    }
}
