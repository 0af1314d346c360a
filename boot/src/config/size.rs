//! Sizes as people write them.
use core::fmt;

/// The text is not a number with K, M or G, or the number does not fit 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SizeError;

impl SizeError {
    pub(super) const WANTED: &'static str = "a size; write a number with K, M or G, such as \"512M\"";
}

impl fmt::Display for SizeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not {}", Self::WANTED)
    }
}

impl core::error::Error for SizeError {}

/// Reads a size in bytes: `64K`, `512M`, `2G`. K is 1024; lower case will do; nothing else may stand there.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let mut digits = text.chars();
    let shift = match digits.next_back() {
        Some('K' | 'k') => 10,
        Some('M' | 'm') => 20,
        Some('G' | 'g') => 30,
        _ => return Err(SizeError),
    };
    let digits = digits.as_str();
    // `parse` would also take a sign.
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(SizeError);
    }
    let count: u64 = digits.parse().map_err(|_| SizeError)?;
    count.checked_mul(1 << shift).ok_or(SizeError)
}
