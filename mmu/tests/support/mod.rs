//! What the tests share: host memory for tables and guests, and models written from the manuals.
#![allow(dead_code, missing_docs, unreachable_pub, unused_imports, unused_macros)]

pub mod blocks;
pub mod flat;
pub mod hardware;
pub mod l1;
pub mod lent;
pub mod machines;
pub mod manual;
pub mod nested;
pub mod shadow;
pub mod tables;
pub mod two_stage;
pub mod vm;
