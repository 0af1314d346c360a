//! What GRUB is told: the text of its configuration files.

/// The configuration of an image: GRUB talks on the serial line where there is one, and starts Umbra at once, after the
/// command `first`.
pub fn image_cfg(first: &str) -> String {
    let menu = "\
if serial --unit=0 --speed=115200; then
    terminal_input serial console
    terminal_output serial
fi
insmod all_video
set timeout=0
set default=0
menuentry \"Umbra\" {
    multiboot2 /boot/umbra
    module2 /boot/bundle.cpio
}
";
    menu.replace("    multiboot2", &format!("    {first}\n    multiboot2"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_menu_loads_what_the_image_holds() {
        for line in ["multiboot2 /boot/umbra\n", "module2 /boot/bundle.cpio\n", "set timeout=0\n"] {
            assert!(image_cfg("").contains(line), "{line}");
        }
        assert!(image_cfg("wrmsr 1 2").contains("{\n    wrmsr 1 2\n    multiboot2 /boot/umbra\n"));
    }
}
