//! Where in umbra.toml the trouble is, and what it is.
use alloc::format;
use alloc::string::String;
use core::fmt;
use core::str::Utf8Error;

pub(super) const NOT_IN_BUNDLE: &str = "is not in the bundle; put one at its top level";

/// A place in a text, both counted from one; columns are characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Line.
    pub line: usize,
    /// Column.
    pub column: usize,
}

impl Position {
    /// The place of the byte at `offset`, which may be the end of the text.
    pub(super) fn of(text: &str, offset: usize) -> Self {
        let before = text.get(..offset).unwrap_or(text);
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Self { line: before.matches('\n').count() + 1, column: before[line_start..].chars().count() + 1 }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// Why a configuration cannot be used. Displays as `FILE:LINE:COLUMN: SENTENCE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    /// The file's name.
    pub file: String,
    /// The place, unless it is the file as a whole.
    pub position: Option<Position>,
    /// What is wrong and what would be right.
    pub message: String,
}

impl Error {
    pub(super) fn at(file: &str, position: Position, message: String) -> Self {
        Self { file: file.into(), position: Some(position), message }
    }

    pub(super) fn whole_file(file: &str, message: String) -> Self {
        Self { file: file.into(), position: None, message }
    }

    pub(super) fn not_utf8(file: &str, bytes: &[u8], error: Utf8Error) -> Self {
        let valid = bytes.get(..error.valid_up_to()).unwrap_or_default();
        let valid = core::str::from_utf8(valid).unwrap_or_default();
        let byte = bytes.get(valid.len()).copied().unwrap_or_default();
        let message = format!("the byte {byte:#04x} is not UTF-8 text; save the file as UTF-8");
        Self::at(file, Position::of(valid, valid.len()), message)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.position {
            Some(position) => write!(f, "{}:{position}: {}", self.file, self.message),
            None => write!(f, "{} {}", self.file, self.message),
        }
    }
}

impl core::error::Error for Error {}
