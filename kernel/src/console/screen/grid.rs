//! The text on the screen: a grid of cells that takes what a terminal would. Pure.
//!
//! Of the escape sequences (ECMA-48) those that line editors and installers use are followed: cursor movement, erasing,
//! inserting and deleting characters, the sixteen colours. All others are swallowed.

use super::cell::{Cell, BLACK, WHITE};
use core::ops::Range;
use vte::{Params, Perform};

/// Widest grid: 1920 pixels of the small font.
pub const MAX_COLUMNS: usize = 280;
/// Highest grid.
pub const MAX_ROWS: usize = 100;

/// Columns between two tabulator stops.
const TAB: usize = 8;

/// Cells of the largest grid.
pub type Cells = [[Cell; MAX_COLUMNS]; MAX_ROWS];

/// Cells, a cursor and the colours of what comes next.
pub struct Grid {
    /// A ring of rows, so that scrolling moves no text; `top` is the screen's first.
    cells: &'static mut Cells,
    top: usize,
    columns: usize,
    rows: usize,
    row: usize,
    column: usize,
    /// The last column was written; the next character begins a new row.
    wraps: bool,
    saved: (usize, usize),
    foreground: u8,
    background: u8,
    bright: bool,
    inverse: bool,
    /// Rows of the screen that have changed since [`Grid::take_changes`].
    changed: Range<usize>,
    scrolled: bool,
}

impl Grid {
    /// An empty grid of that size, within its limits.
    pub fn new(cells: &'static mut Cells, columns: usize, rows: usize) -> Self {
        let mut grid = Self {
            cells,
            top: 0,
            columns: columns.min(MAX_COLUMNS),
            rows: rows.min(MAX_ROWS),
            row: 0,
            column: 0,
            wraps: false,
            saved: (0, 0),
            foreground: WHITE,
            background: BLACK,
            bright: false,
            inverse: false,
            changed: 0..0,
            scrolled: false,
        };
        grid.reset();
        grid
    }

    /// Empties the grid and forgets what was set.
    fn reset(&mut self) {
        (self.foreground, self.background, self.bright, self.inverse) = (WHITE, BLACK, false, false);
        (self.row, self.column, self.wraps, self.saved) = (0, 0, false, (0, 0));
        self.erase(0..self.rows, 0..self.columns);
    }

    /// Columns and rows.
    pub fn size(&self) -> (usize, usize) {
        (self.columns, self.rows)
    }

    /// The cells of row `row` of the screen.
    pub fn row(&self, row: usize) -> &[Cell] {
        &self.cells[self.ring(row)][..self.columns]
    }

    /// Row and column of the cursor.
    pub fn cursor(&self) -> (usize, usize) {
        (self.row, self.column)
    }

    /// Whether everything has moved since [`Grid::take_changes`].
    pub fn has_scrolled(&self) -> bool {
        self.scrolled
    }

    /// The rows that may look otherwise than they did at the last call.
    pub fn take_changes(&mut self) -> Range<usize> {
        self.scrolled = false;
        core::mem::replace(&mut self.changed, 0..0)
    }

    /// Makes all rows count as changed.
    pub fn touch_all(&mut self) {
        self.touch(0..self.rows);
    }

    /// Index into `cells` of a row of the screen.
    fn ring(&self, row: usize) -> usize {
        (self.top + row) % self.rows.max(1)
    }

    fn touch(&mut self, rows: Range<usize>) {
        self.changed = if self.changed.is_empty() {
            rows
        } else {
            self.changed.start.min(rows.start)..self.changed.end.max(rows.end)
        };
    }

    /// The cell for a character in the present colours.
    fn cell(&self, character: char) -> Cell {
        let foreground = if self.bright { self.foreground | 8 } else { self.foreground };
        match self.inverse {
            true => Cell::new(character, self.background, foreground),
            false => Cell::new(character, foreground, self.background),
        }
    }

    fn erase(&mut self, rows: Range<usize>, columns: Range<usize>) {
        let blank = Cell::new(' ', WHITE, self.background);
        for row in rows.start..rows.end.min(self.rows) {
            let at = self.ring(row);
            let end = columns.end.min(self.columns);
            if let Some(cells) = self.cells[at].get_mut(columns.start..end) {
                cells.fill(blank);
            }
        }
        self.touch(rows.start..rows.end.min(self.rows));
    }

    fn move_to(&mut self, row: usize, column: usize) {
        self.row = row.min(self.rows.saturating_sub(1));
        self.column = column.min(self.columns.saturating_sub(1));
        self.wraps = false;
    }

    fn line_feed(&mut self) {
        self.wraps = false;
        if self.row + 1 < self.rows {
            self.row += 1;
            return;
        }
        self.top = self.ring(1);
        let last = self.rows.saturating_sub(1);
        self.erase(last..self.rows, 0..self.columns);
        self.touch(0..self.rows);
        self.scrolled = true;
    }

    fn reverse_line_feed(&mut self) {
        self.wraps = false;
        if self.row > 0 {
            self.row -= 1;
            return;
        }
        self.top = self.ring(self.rows.saturating_sub(1));
        self.erase(0..1, 0..self.columns);
        self.touch(0..self.rows);
        self.scrolled = true;
    }

    /// Moves the rest of the row by `count` cells, to the right or to the left, and blanks what is left free.
    fn shift(&mut self, count: usize, right: bool) {
        let (at, column, columns) = (self.ring(self.row), self.column, self.columns);
        let count = count.min(columns - column);
        let blank = Cell::new(' ', WHITE, self.background);
        let cells = &mut self.cells[at][column..columns];
        if right {
            cells.copy_within(..cells.len() - count, count);
            cells[..count].fill(blank);
        } else {
            cells.copy_within(count.., 0);
            let kept = cells.len() - count;
            cells[kept..].fill(blank);
        }
        self.touch(self.row..self.row + 1);
    }

    fn colours(&mut self, params: &Params) {
        let mut params = params.iter();
        while let Some(param) = params.next() {
            match param.first().copied().unwrap_or(0) {
                0 => {
                    (self.foreground, self.background, self.bright, self.inverse) =
                        (WHITE, BLACK, false, false);
                }
                1 => self.bright = true,
                7 => self.inverse = true,
                22 => self.bright = false,
                27 => self.inverse = false,
                colour @ 30..=37 => self.foreground = (colour - 30) as u8,
                39 => self.foreground = WHITE,
                colour @ 40..=47 => self.background = (colour - 40) as u8,
                49 => self.background = BLACK,
                colour @ 90..=97 => self.foreground = (colour - 90) as u8 | 8,
                colour @ 100..=107 => self.background = (colour - 100) as u8 | 8,
                // A colour of 256 or of millions: two or four more numbers, unless they are in this one.
                38 | 48 if param.len() == 1 => {
                    let more = match params.next().and_then(|kind| kind.first().copied()) {
                        Some(5) => 1,
                        Some(2) => 3,
                        _ => 0,
                    };
                    (0..more).for_each(|_| _ = params.next());
                }
                _ => {}
            }
        }
    }
}

impl Perform for Grid {
    fn print(&mut self, character: char) {
        if self.columns == 0 || self.rows == 0 {
            return;
        }
        if self.wraps {
            self.column = 0;
            self.line_feed();
        }
        let (at, cell) = (self.ring(self.row), self.cell(character));
        self.cells[at][self.column] = cell;
        self.touch(self.row..self.row + 1);
        if self.column + 1 < self.columns {
            self.column += 1;
        } else {
            self.wraps = true;
        }
    }

    fn execute(&mut self, byte: u8) {
        match byte {
            0x08 => self.move_to(self.row, self.column.saturating_sub(1)),
            b'\t' => self.move_to(self.row, (self.column / TAB + 1) * TAB),
            // Some guests leave the carriage return to the terminal; few mean the column below.
            b'\n' | 0x0b | 0x0c => {
                self.move_to(self.row, 0);
                self.line_feed();
            }
            b'\r' => self.move_to(self.row, 0),
            _ => {}
        }
    }

    fn csi_dispatch(&mut self, params: &Params, intermediates: &[u8], ignore: bool, action: char) {
        if ignore || !intermediates.is_empty() || self.columns == 0 || self.rows == 0 {
            return;
        }
        let number = |index: usize| {
            usize::from(params.iter().nth(index).and_then(|param| param.first().copied()).unwrap_or(0))
        };
        // Of counts and coordinates zero means one.
        let count = number(0).max(1);
        let (row, column) = (self.row, self.column);
        match action {
            'A' => self.move_to(row.saturating_sub(count), column),
            'B' | 'e' => self.move_to(row + count, column),
            'C' | 'a' => self.move_to(row, column + count),
            'D' => self.move_to(row, column.saturating_sub(count)),
            'E' => self.move_to(row + count, 0),
            'F' => self.move_to(row.saturating_sub(count), 0),
            'G' | '`' => self.move_to(row, count - 1),
            'H' | 'f' => self.move_to(count - 1, number(1).max(1) - 1),
            'd' => self.move_to(count - 1, column),
            'J' => match number(0) {
                0 => {
                    self.erase(row..row + 1, column..self.columns);
                    self.erase(row + 1..self.rows, 0..self.columns);
                }
                1 => {
                    self.erase(0..row, 0..self.columns);
                    self.erase(row..row + 1, 0..column + 1);
                }
                _ => self.erase(0..self.rows, 0..self.columns),
            },
            'K' => match number(0) {
                0 => self.erase(row..row + 1, column..self.columns),
                1 => self.erase(row..row + 1, 0..column + 1),
                _ => self.erase(row..row + 1, 0..self.columns),
            },
            'X' => self.erase(row..row + 1, column..column + count),
            '@' => self.shift(count, true),
            'P' => self.shift(count, false),
            's' => self.saved = (row, column),
            'u' => self.move_to(self.saved.0, self.saved.1),
            'm' => self.colours(params),
            _ => {}
        }
    }

    fn esc_dispatch(&mut self, intermediates: &[u8], ignore: bool, byte: u8) {
        if ignore || !intermediates.is_empty() {
            return;
        }
        match byte {
            b'7' => self.saved = (self.row, self.column),
            b'8' => self.move_to(self.saved.0, self.saved.1),
            b'D' => self.line_feed(),
            b'E' => {
                self.move_to(self.row, 0);
                self.line_feed();
            }
            b'M' => self.reverse_line_feed(),
            b'c' => self.reset(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vte::Parser;

    fn grid(columns: usize, rows: usize, text: &[u8]) -> Grid {
        let cells = Box::leak(Box::new([[Cell::BLANK; MAX_COLUMNS]; MAX_ROWS]));
        let mut grid = Grid::new(cells, columns, rows);
        Parser::new().advance(&mut grid, text);
        grid
    }

    fn shown(grid: &Grid) -> Vec<String> {
        (0..grid.rows)
            .map(|row| grid.row(row).iter().map(|cell| cell.character()).collect::<String>())
            .map(|line| line.trim_end().to_owned())
            .collect()
    }

    #[test]
    fn text_wraps_and_scrolls() {
        let grid = grid(5, 3, b"one\r\ntwo three\r\nx");
        assert_eq!(shown(&grid), ["two t", "hree", "x"]);
        assert!(grid.has_scrolled());
        assert_eq!(grid.cursor(), (2, 1));
        let full = self::grid(5, 2, b"12345\r\n6");
        assert_eq!(shown(&full), ["12345", "6"], "a full row alone begins no new one");
    }

    #[test]
    fn control_characters_move_the_cursor() {
        assert_eq!(shown(&grid(20, 2, b"abc\x08\x08X\tY\rZ\x07\x00")), ["ZXc     Y", ""]);
        assert_eq!(shown(&grid(10, 3, b"a\nb\x0bc")), ["a", "b", "c"], "a line feed begins a line");
        assert_eq!(grid(10, 3, b"\t\t\t\t").cursor(), (0, 9), "tabs end at the margin");
    }

    #[test]
    fn utf_8_is_read_and_what_is_not_is_replaced() {
        assert_eq!(shown(&grid(12, 1, "é€\u{1f600}|".as_bytes())), ["é€\u{1f600}|"]);
        assert_eq!(shown(&grid(12, 1, b"a\xff\xfeb")), ["a\u{fffd}\u{fffd}b"]);
    }

    #[test]
    fn a_line_editor_can_edit() {
        let typed = b"$ echo hullo\x1b[4D\x1b[Ke\x1b[Cx\x1b[2D\x1b[1P\x1b[1@l";
        assert_eq!(shown(&grid(20, 1, typed)), ["$ echo helx"]);
        assert_eq!(shown(&grid(6, 2, b"aaaaaabbb\x1b[H\x1b[J")), ["", ""]);
        assert_eq!(shown(&grid(6, 2, b"abcdef\x1b[1;3H\x1b[1K\x1b[2;2Hx")), ["   def", " x"]);
        assert_eq!(shown(&grid(6, 2, b"abc\x1b7\x1b[2;1Hzz\x1b8d\x1b[2J")), ["", ""]);
        assert_eq!(shown(&grid(6, 2, b"a\x1b[99;99Hb\x1b[99A\x1b[99DX")), ["X", "     b"]);
        assert_eq!(shown(&grid(6, 2, b"a\r\nb\x1b[H\x1bMz")), ["z", "a"], "reverse line feed");
    }

    #[test]
    fn what_has_no_meaning_here_is_swallowed() {
        let text = b"a\x1b[?25l\x1b[6n\x1b]0;title\x07\x1b(B\x1b[>c\x1bPq#1\x1b\\\x1b[1;2;3;4zb";
        assert_eq!(shown(&grid(20, 1, text)), ["ab"]);
    }

    #[test]
    fn colours_are_the_sixteen() {
        let grid = grid(
            20,
            1,
            b"\x1b[31ma\x1b[1;44mb\x1b[0mc\x1b[7md\x1b[27;38;5;9;92me\x1b[38:2:1:2:3mf\x1b[mg\x1b[48;2;1;2;3;33mh",
        );
        let colours: Vec<_> =
            grid.row(0)[..8].iter().map(|cell| (cell.foreground(), cell.background())).collect();
        assert_eq!(colours, [(1, 0), (9, 4), (7, 0), (0, 7), (10, 0), (10, 0), (7, 0), (3, 0)]);
    }

    #[test]
    fn changes_are_told_once() {
        let mut grid = grid(10, 4, b"");
        grid.take_changes();
        Parser::new().advance(&mut grid, b"a\r\n\nb");
        assert_eq!(grid.take_changes(), 0..3);
        assert!(grid.take_changes().is_empty());
        Parser::new().advance(&mut grid, b"\r\n\n");
        assert_eq!((grid.has_scrolled(), grid.take_changes()), (true, 0..4));
        assert!(!grid.has_scrolled());
    }

    #[test]
    fn a_grid_without_cells_takes_everything() {
        let grid = grid(0, 0, b"text\r\n\x1b[2J\x1b[5;5H\x1b[P\x1bM\x1bc\t");
        assert_eq!(grid.size(), (0, 0));
    }

    proptest! {
        #[test]
        fn nothing_that_a_guest_writes_can_break_it(
            bytes in prop::collection::vec(prop_oneof![any::<u8>(), Just(0x1b), Just(b'['), Just(b';'),
                b'0'..=b'9', b'@'..=b'z'], 0..400),
            columns in 0usize..12, rows in 0usize..5,
        ) {
            let grid = grid(columns, rows, &bytes);
            let (row, column) = grid.cursor();
            prop_assert!(row < rows.max(1) && column < columns.max(1));
            prop_assert!(grid.changed.end <= rows);
        }
    }
}
