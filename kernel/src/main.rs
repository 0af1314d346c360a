//! The bare-metal image: the entry point that `boot` calls, then the kernel.
#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod image {
    // `boot` holds the entry stub and is otherwise reached only from it.
    use boot as _;

    bootloader_api::entry_point!(kernel::start);
}

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!("umbra runs on bare metal; build it with `cargo xtask build`");
}
