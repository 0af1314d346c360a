//! Every developer command, as a library that the emulator tests share.
