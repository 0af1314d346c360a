//! The console on a screen: text goes into a grid of cells, and what changed of it is painted. Pure: the screen's memory
//! is behind [`Pixels`].

pub mod cell;
pub mod format;
pub mod grid;
pub mod paint;

use cell::Cell;
use format::Layout;
use grid::{Cells, Grid, MAX_COLUMNS, MAX_ROWS};
use paint::{Painter, Pixels};
use vte::Parser;

/// Longest operating-system command that is remembered while it is swallowed.
const COMMAND_BYTES: usize = 16;

/// The text of a screen and what it shows of it. All zeros at first, so that a static one takes no room in the image.
pub struct Buffers {
    text: Cells,
    shown: Cells,
}

impl Buffers {
    /// Blanks.
    pub const fn new() -> Self {
        Self { text: [[Cell::BLANK; MAX_COLUMNS]; MAX_ROWS], shown: [[Cell::BLANK; MAX_COLUMNS]; MAX_ROWS] }
    }
}

impl Default for Buffers {
    fn default() -> Self {
        Self::new()
    }
}

/// A screen. Without memory it keeps the text until there is some.
pub struct Screen<M> {
    grid: Grid,
    /// What each cell on the screen shows.
    shown: &'static mut Cells,
    /// Where the cursor was painted.
    cursor: (usize, usize),
    parser: Parser<COMMAND_BYTES>,
    painter: Painter,
    memory: Option<M>,
    /// What the memory shows is not known.
    unknown: bool,
}

impl<M: Pixels> Screen<M> {
    /// An empty screen without memory.
    pub fn new(painter: Painter, buffers: &'static mut Buffers) -> Self {
        let (columns, rows) = painter.cells();
        Self {
            grid: Grid::new(&mut buffers.text, columns, rows),
            shown: &mut buffers.shown,
            cursor: (0, 0),
            parser: Parser::new_with_size(),
            painter,
            memory: None,
            unknown: true,
        }
    }

    /// Gives it its memory, the same in another place, or takes it away for a while.
    pub fn set_memory(&mut self, memory: Option<M>) {
        self.memory = memory;
    }

    /// The layout of its memory.
    pub fn layout(&self) -> &Layout {
        self.painter.layout()
    }

    /// Columns and rows of text.
    pub fn size(&self) -> (usize, usize) {
        self.grid.size()
    }

    /// Takes text, and shows nothing of it yet.
    pub fn write(&mut self, bytes: &[u8]) {
        self.parser.advance(&mut self.grid, bytes);
    }

    /// Whether the next [`Screen::paint`] paints the whole screen.
    pub fn has_moved(&self) -> bool {
        self.grid.has_scrolled() || self.unknown
    }

    /// Makes the screen show the text.
    pub fn paint(&mut self) {
        let (painter, Some(memory)) = (&self.painter, &mut self.memory) else { return };
        if core::mem::take(&mut self.unknown) {
            painter.clear(memory);
            // A space has no pixels, so black is what blanks look like.
            self.shown.iter_mut().for_each(|row| row.fill(Cell::BLANK));
            self.grid.touch_all();
        }
        let rows = self.grid.take_changes();
        let cursor = self.grid.cursor();
        let with_cursors = [self.cursor.0, cursor.0];
        for row in rows.clone().chain(with_cursors.into_iter().filter(|row| !rows.contains(row))) {
            if row >= self.grid.size().1 {
                continue;
            }
            for (column, &cell) in self.grid.row(row).iter().enumerate() {
                let cell = if (row, column) == cursor { cell.inverted() } else { cell };
                let shown = &mut self.shown[row][column];
                if *shown != cell {
                    *shown = cell;
                    painter.paint(memory, row, column, cell);
                }
            }
        }
        self.cursor = cursor;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bootloader_api::info::{FrameBufferInfo, PixelFormat};

    /// Memory that counts what is written to it.
    #[derive(Default)]
    struct Counted {
        bytes: Vec<u8>,
        writes: usize,
    }

    impl Pixels for Counted {
        fn write(&mut self, offset: usize, bytes: &[u8]) {
            self.writes += 1;
            self.bytes[offset..offset + bytes.len()].copy_from_slice(bytes);
        }
    }

    fn layout() -> Layout {
        let info = FrameBufferInfo {
            byte_len: 80 * 64 * 4,
            width: 80,
            height: 64,
            pixel_format: PixelFormat::Bgr,
            bytes_per_pixel: 4,
            stride: 80,
        };
        Layout::of(&info, false).unwrap()
    }

    fn memory() -> Counted {
        Counted { bytes: vec![0x55; layout().bytes()], writes: 0 }
    }

    fn screen() -> Screen<Counted> {
        Screen::new(Painter::new(layout()), Box::leak(Box::new(Buffers::new())))
    }

    fn writes(screen: &mut Screen<Counted>) -> usize {
        core::mem::take(&mut screen.memory.as_mut().unwrap().writes)
    }

    #[test]
    fn only_what_changed_is_painted() {
        let mut screen = screen();
        screen.set_memory(Some(memory()));
        assert!(screen.has_moved());
        screen.paint();
        assert!(!screen.memory.as_ref().unwrap().bytes.contains(&0x55), "what was there before is gone");
        writes(&mut screen);
        screen.write(b"ab");
        screen.paint();
        assert_eq!(writes(&mut screen), 3 * 16, "two letters and the cursor");
        screen.paint();
        assert_eq!(writes(&mut screen), 0);
        screen.write(b"\r\n\n\n\n");
        assert!(screen.has_moved());
        screen.paint();
        assert_eq!(writes(&mut screen), 4 * 16, "the letters, the cursor, and where it was");
    }

    #[test]
    fn text_waits_for_memory() {
        let mut early = screen();
        early.write(b"umbra: hello");
        early.paint();
        early.set_memory(Some(memory()));
        early.paint();
        let mut late = screen();
        late.set_memory(Some(memory()));
        late.write(b"umbra: hello");
        late.paint();
        assert_eq!(early.memory.unwrap().bytes, late.memory.unwrap().bytes);
    }

    #[test]
    fn the_memory_may_move() {
        let mut screen = screen();
        screen.set_memory(Some(memory()));
        screen.write(b"x");
        screen.paint();
        let moved = screen.memory.take();
        screen.write(b"y");
        screen.paint();
        screen.set_memory(moved);
        writes(&mut screen);
        screen.paint();
        assert_eq!(writes(&mut screen), 2 * 16, "the letter and the cursor");
    }
}
