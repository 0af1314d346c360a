//! Scenarios that boot Umbra in an emulator and judge what it does.
fn main() {}
