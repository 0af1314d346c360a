//! Guest memory for the tests of devices.

use crate::vm::ram::{BadGpa, GuestRam};
use std::cell::RefCell;

/// RAM from guest-physical address 0.
pub(crate) struct Ram(pub(crate) RefCell<Vec<u8>>);

impl Ram {
    /// `len` bytes of 0xcc.
    pub(crate) fn new(len: usize) -> Self {
        Ram(RefCell::new(vec![0xcc; len]))
    }

    fn range(&self, gpa: u64, len: usize) -> Result<core::ops::Range<usize>, BadGpa> {
        let end = gpa.checked_add(len as u64).filter(|&end| end <= self.0.borrow().len() as u64);
        end.map(|end| gpa as usize..end as usize).ok_or(BadGpa { gpa, len })
    }
}

impl GuestRam for Ram {
    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), BadGpa> {
        let range = self.range(gpa, buf.len())?;
        buf.copy_from_slice(&self.0.borrow()[range]);
        Ok(())
    }

    fn write(&self, gpa: u64, data: &[u8]) -> Result<(), BadGpa> {
        let range = self.range(gpa, data.len())?;
        self.0.borrow_mut()[range].copy_from_slice(data);
        Ok(())
    }
}
