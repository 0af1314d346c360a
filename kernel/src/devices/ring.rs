//! A bounded byte queue without a heap, for FIFOs and for what waits between a guest and the console.

use core::fmt;

/// First-in first-out queue of at most `N` bytes.
#[derive(Clone, Copy)]
pub struct Ring<const N: usize> {
    buf: [u8; N],
    head: usize,
    len: usize,
}

impl<const N: usize> Ring<N> {
    /// An empty queue.
    pub const fn new() -> Self {
        Self { buf: [0; N], head: 0, len: 0 }
    }

    /// Number of bytes queued.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is queued.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of bytes that still fit.
    pub const fn free(&self) -> usize {
        N - self.len
    }

    /// Appends a byte; false if the queue is full, which leaves it unchanged.
    pub fn push(&mut self, byte: u8) -> bool {
        if self.len == N {
            return false;
        }
        self.buf[(self.head + self.len) % N] = byte;
        self.len += 1;
        true
    }

    /// What is queued, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = u8> + '_ {
        (0..self.len).map(|i| self.buf[(self.head + i) % N])
    }

    /// Takes the oldest byte.
    pub fn pop(&mut self) -> Option<u8> {
        if self.len == 0 {
            return None;
        }
        let byte = self.buf[self.head];
        self.head = (self.head + 1) % N;
        self.len -= 1;
        Some(byte)
    }

    /// Drops everything queued.
    pub fn clear(&mut self) {
        self.head = 0;
        self.len = 0;
    }
}

/// Two queues are equal if the same bytes wait in them.
impl<const N: usize> PartialEq for Ring<N> {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl<const N: usize> Eq for Ring<N> {}

impl<const N: usize> fmt::Debug for Ring<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

impl<const N: usize> Default for Ring<N> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_order_across_the_wrap() {
        let mut ring = Ring::<4>::new();
        for round in 0..10u8 {
            for i in 0..3 {
                assert!(ring.push(round * 3 + i));
            }
            for i in 0..3 {
                assert_eq!(ring.pop(), Some(round * 3 + i));
            }
        }
        assert_eq!(ring.pop(), None);
    }

    #[test]
    fn refuses_when_full() {
        let mut ring = Ring::<2>::new();
        assert!(ring.push(1) && ring.push(2) && !ring.push(3));
        assert_eq!((ring.len(), ring.free()), (2, 0));
        assert_eq!((ring.pop(), ring.pop(), ring.pop()), (Some(1), Some(2), None));
    }
}
