//! What every test guest shares: entry, console, case reporting.
#![no_std]
