//! One character of the screen with its colours.

/// Colours by the numbers that escape sequences give them (ECMA-48, 8.3.117; 8 and above are the bright ones).
pub const WHITE: u8 = 7;
/// See [`WHITE`].
pub const BLACK: u8 = 0;

/// A character and its colours in one word. Zero is a blank in white on black, so that a grid needs no initial values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell(u32);

impl Cell {
    /// A space, white on black.
    pub const BLANK: Self = Self(0);

    const FOREGROUND: u32 = 24;
    const BACKGROUND: u32 = 28;

    /// `character` in two of sixteen colours.
    pub const fn new(character: char, foreground: u8, background: u8) -> Self {
        Self(
            (character as u32 ^ ' ' as u32)
                | ((foreground ^ WHITE) as u32 & 0xf) << Self::FOREGROUND
                | (background as u32 & 0xf) << Self::BACKGROUND,
        )
    }

    /// The character.
    pub fn character(self) -> char {
        char::from_u32((self.0 & 0x1f_ffff) ^ ' ' as u32).unwrap_or(char::REPLACEMENT_CHARACTER)
    }

    /// Number of the character's colour.
    pub const fn foreground(self) -> u8 {
        (self.0 >> Self::FOREGROUND) as u8 & 0xf ^ WHITE
    }

    /// Number of the colour behind it.
    pub const fn background(self) -> u8 {
        (self.0 >> Self::BACKGROUND) as u8 & 0xf
    }

    /// The same with its colours exchanged, as the cursor shows it.
    pub fn inverted(self) -> Self {
        Self::new(self.character(), self.background(), self.foreground())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_keeps_what_it_is_given() {
        assert_eq!(Cell::BLANK, Cell::new(' ', WHITE, BLACK));
        for character in [' ', 'A', '~', 'é', char::REPLACEMENT_CHARACTER, char::MAX] {
            for (foreground, background) in [(0, 0), (7, 0), (15, 4), (1, 15)] {
                let cell = Cell::new(character, foreground, background);
                assert_eq!(
                    (cell.character(), cell.foreground(), cell.background()),
                    (character, foreground, background)
                );
                assert_eq!(cell.inverted(), Cell::new(character, background, foreground));
            }
        }
    }
}
