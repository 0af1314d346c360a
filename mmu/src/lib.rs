//! Every way a guest address becomes a host address: page-table kinds, roles, walkers.
#![cfg_attr(not(test), no_std)]
#![deny(unsafe_code)]
