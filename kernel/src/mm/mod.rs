//! Physical memory, Umbra's own address space and heap.

pub mod frames;
pub mod map;
pub mod paging;
pub mod ranges;
