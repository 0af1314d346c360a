//! What umbra.toml may say, and what each mistake is told.
use super::*;
use crate::bundle::Writer;
use proptest::prelude::*;
use std::string::{String, ToString};
use std::vec::Vec;

const KEYS: &str =
    "\"name\", \"vcpus\", \"memory\", \"kernel\", \"initrd\", \"modules\", \"cmdline\", \"mmu\", \
                    \"nested\", \"page_size\", \"exit_port\", \"on_reset\", \"console\"";

fn error(text: &str) -> String {
    Config::parse("umbra.toml", text).expect_err(text).to_string()
}

fn errors(cases: &[(&str, &str)]) {
    for (text, sentence) in cases {
        assert_eq!(&error(text), sentence, "{text}");
    }
}

/// Errors for a VM that is right but for the lines given, which begin at line 5.
fn vm_errors(cases: &[(&str, &str)]) {
    for (lines, sentence) in cases {
        let text = format!("[[vm]]\nname = \"a\"\nmemory = \"64M\"\nkernel = \"vmlinuz\"\n{lines}\n");
        assert_eq!(error(&text), format!("umbra.toml:5:{sentence}"), "{lines}");
    }
}

#[test]
fn a_vm_of_three_lines_has_defaults() {
    let config = Config::parse("f", "[[vm]]\nname = \"a\"\nmemory = \"1M\"\nkernel = \"k\"").unwrap();
    assert_eq!(config.at_end, AtEnd::PowerOff);
    assert_eq!(config.console, [Console::Com1, Console::Framebuffer]);
    let [vm] = &config.vms[..] else { panic!("{config:?}") };
    assert_eq!((vm.name.as_str(), vm.vcpus, vm.memory_bytes), ("a", 1, 1 << 20));
    assert_eq!((vm.kernel.name.as_str(), &vm.initrd, vm.modules.len()), ("k", &None, 0));
    assert_eq!((vm.cmdline.as_str(), vm.mmu, vm.nested), ("", MmuMode::Direct, false));
    assert_eq!((vm.page_size, vm.exit_port), (PageSize::Auto, None));
    assert_eq!((vm.on_reset, vm.console), (OnReset::Restart, true));
}

#[test]
fn every_key_is_read() {
    let text = r#"
        [umbra]
        at_end = "halt"
        console = ["framebuffer", "com2"]

        [[vm]]                      # comment
        name = "debian-12.test_A"
        vcpus = 64
        memory = "2G"
        kernel = "boot/vmlinuz"
        initrd = "initrd.img"
        modules = ["one a b", "two"]
        cmdline = "console=ttyS0 é"
        mmu = "shadow"
        nested = false
        page_size = "4K"
        exit_port = 0xf4
        on_reset = "stop"
        console = false

        [[vm]]
        name = "second"
        memory = "65536K"
        kernel = "k"
        nested = true
        page_size = "1G"
    "#;
    let config = Config::parse("f", text).unwrap();
    assert_eq!(config.at_end, AtEnd::Halt);
    assert_eq!(config.console, [Console::Framebuffer, Console::Com2]);
    let [first, second] = &config.vms[..] else { panic!("{config:?}") };
    assert_eq!((first.name.as_str(), first.vcpus, first.memory_bytes), ("debian-12.test_A", 64, 2 << 30));
    assert_eq!(first.initrd.as_ref().map(|file| file.name.as_str()), Some("initrd.img"));
    let modules: Vec<_> =
        first.modules.iter().map(|module| (module.file.name.as_str(), module.cmdline.as_str())).collect();
    assert_eq!(modules, [("one", "one a b"), ("two", "two")]);
    assert_eq!((first.cmdline.as_str(), first.mmu), ("console=ttyS0 é", MmuMode::Shadow));
    assert_eq!((first.nested, first.page_size, first.exit_port), (false, PageSize::Size4K, Some(0xf4)));
    assert_eq!((first.on_reset, first.console), (OnReset::Stop, false));
    assert_eq!((second.memory_bytes, second.nested), (64 << 20, true));
    assert_eq!(second.page_size, PageSize::Size1G);
    let files: Vec<_> = config.files().map(|file| file.name.as_str()).collect();
    assert_eq!(files, ["boot/vmlinuz", "initrd.img", "one", "two", "k"]);
}

#[test]
fn broken_sections() {
    let no_vm = "umbra.toml:1:1: no VM is described; add a section [[vm]] with name, memory and kernel";
    errors(&[
        ("", no_vm),
        ("[umbra]\nat_end = \"halt\"", no_vm),
        ("vm = []", no_vm),
        (
            "[vm]\nname = \"a\"",
            "umbra.toml:1:1: found map, expected a section [[vm]], in double brackets, for each VM",
        ),
        ("vm = [3]", "umbra.toml:1:7: found integer \"3\", expected a section of keys and values"),
        ("umbra = [\"halt\"]", "umbra.toml:1:9: found sequence, expected a section of keys and values"),
        ("[umbra]\nx = 1", "umbra.toml:2:1: unknown key \"x\", expected \"at_end\" or \"console\""),
        (
            "[umbra]\nconsole = \"com1\"",
            "umbra.toml:2:11: console = \"com1\" is not a list of consoles; write some of \"com1\", \"com2\", \
             \"framebuffer\"",
        ),
        (
            "[umbra]\nconsole = []",
            "umbra.toml:2:11: console = [] is not a list of consoles; write some of \"com1\", \"com2\", \"framebuffer\"",
        ),
        (
            "[umbra]\nconsole = [\"com1\", \"vga\"]",
            "umbra.toml:2:20: console has \"vga\", which is none; write \"com1\", \"com2\" or \"framebuffer\"",
        ),
        (
            "[umbra]\nconsole = [1]",
            "umbra.toml:2:12: console has 1, which is none; write \"com1\", \"com2\" or \"framebuffer\"",
        ),
        (
            "[umbra]\nconsole = [\"com1\", \"com1\"]",
            "umbra.toml:2:11: console = [\"com1\", \"com1\"] is one console twice; name each once",
        ),
        (
            "[umbra]\nat_end = \"reboot\"",
            "umbra.toml:2:10: at_end = \"reboot\" is not a way to end; write \"poweroff\" or \"halt\"",
        ),
        ("\n[vms]", "umbra.toml:2:2: unknown key \"vms\", expected \"umbra\" or \"vm\""),
        ("[[vm]]", "umbra.toml:1:1: this VM has no name; add name = \"NAME\""),
        (
            "\n[[vm]]\nname = \"a\"",
            "umbra.toml:2:1: the VM \"a\" has no memory; add a size, such as memory = \"512M\"",
        ),
        (
            "[[vm]]\nname = \"a\"\nmemory = \"1M\"",
            "umbra.toml:1:1: the VM \"a\" has no kernel; add kernel = \"FILE\", a file in the bundle",
        ),
    ]);
}

#[test]
fn broken_syntax() {
    vm_errors(&[
        ("[[vm]", "6: unclosed array table, expected \"]\""),
        ("cmdline = \"x", "13: invalid basic string, expected \"\"\""),
        ("vcpus = ", "9: string values must be quoted, expected literal string"),
        ("name = \"b\"", "1: the key \"name\" is given twice; remove one"),
        ("memroy = \"64M\"", &format!("1: unknown key \"memroy\", expected one of {KEYS}")),
        ("umbra = 1", &format!("1: unknown key \"umbra\", expected one of {KEYS}")),
    ]);
}

#[test]
fn broken_names() {
    let name_error = |name: &str| error(&format!("[[vm]]\nname = {name}\nmemory = \"1M\"\nkernel = \"k\""));
    let not_a_name = "is not a name; write 1 to 64 letters, digits, -, _ or .";
    for name in ["\"\"", "\"a b\"", "\"ü\"", "\"a/b\"", "3", "[\"a\"]"] {
        assert_eq!(name_error(name), format!("umbra.toml:2:8: name = {name} {not_a_name}"));
    }
    // Long values are quoted in part.
    let long = "x".repeat(MAX_NAME + 1);
    let quoted = &long[..59];
    assert_eq!(
        name_error(&format!("\"{long}\"")),
        format!("umbra.toml:2:8: name = \"{quoted}… {not_a_name}")
    );
    let two = "[[vm]]\nname = \"a\"\nmemory = \"1M\"\nkernel = \"k\"\n".repeat(2);
    assert_eq!(error(&two), "umbra.toml:6:8: name = \"a\" is taken by the VM of line 2; give each its own");
}

#[test]
fn broken_memory() {
    let memory_error =
        |memory: &str| error(&format!("[[vm]]\nname = \"a\"\n  memory = {memory}\nkernel = \"k\""));
    for memory in [
        "\"12Q\"",
        "\"\"",
        "\"M\"",
        "512",
        "\"512\"",
        "\"-1M\"",
        "\"+1M\"",
        "\"1.5G\"",
        "\"1 M\"",
        "\"99999999999G\"",
    ] {
        assert_eq!(
            memory_error(memory),
            format!(
                "umbra.toml:3:12: memory = {memory} is not a size; \
                 write a number with K, M or G, such as \"512M\""
            )
        );
    }
    assert_eq!(
        memory_error("\"0M\""),
        "umbra.toml:3:12: memory = \"0M\" is too little; write \"1M\" or more"
    );
    assert_eq!(
        memory_error("\"1022K\""),
        "umbra.toml:3:12: memory = \"1022K\" is too little; write \"1M\" or more"
    );
    assert_eq!(
        memory_error("\"1025K\""),
        "umbra.toml:3:12: memory = \"1025K\" is not whole pages; write a multiple of \"4K\""
    );
    assert_eq!(
        memory_error("\"65537G\""),
        "umbra.toml:3:12: memory = \"65537G\" is more than a VM can have; write \"65536G\" or less"
    );
}

#[test]
fn broken_numbers_and_words() {
    for value in
        ["0", "65", "-1", "\"2\"", "1.5", "[1, [2]]", "{ a = 1 }", "1979-05-27", "99999999999999999999"]
    {
        let vcpus = format!("9: vcpus = {value} is not a number of virtual CPUs; write 1 to 64");
        vm_errors(&[(&format!("vcpus = {value}"), &vcpus)]);
    }
    for value in ["0", "0x10000", "-1", "\"0xf4\"", "true"] {
        let port = format!("13: exit_port = {value} is not an I/O port; write a number from 1 to 0xffff");
        vm_errors(&[(&format!("exit_port = {value}"), &port)]);
    }
    vm_errors(&[
        ("mmu = \"fast\"", "7: mmu = \"fast\" is not a kind of MMU; write \"direct\" or \"shadow\""),
        ("mmu = \"Direct\"", "7: mmu = \"Direct\" is not a kind of MMU; write \"direct\" or \"shadow\""),
        (
            "page_size = \"3M\"",
            "13: page_size = \"3M\" is not a page size; write \"auto\", \"4K\", \"2M\" or \"1G\"",
        ),
        (
            "on_reset = false",
            "12: on_reset = false is not an answer to a reset; write \"restart\" or \"stop\"",
        ),
        ("console = \"yes\"", "11: console = \"yes\" is not true or false"),
        ("nested = 1", "10: nested = 1 is not true or false"),
        (
            "nested = true\nmmu = \"shadow\"",
            "10: nested = true is possible only with mmu = \"direct\"; change one of them",
        ),
    ]);
}

#[test]
fn broken_texts_and_files() {
    let long = format!("cmdline = \"{}\"", "é".repeat(1024));
    let long_module = format!("modules = [\"m {}\"]", "x".repeat(MAX_CMDLINE));
    vm_errors(&[
        ("cmdline = 3", "11: cmdline = 3 is not a text in quotes"),
        ("cmdline = \"a\\u0000b\"", "11: cmdline contains a NUL, which would end it early; remove it"),
        (&long, "11: cmdline has 2048 bytes; shorten it to 2047"),
        ("initrd = \"\"", "10: initrd = \"\" is not the name of a file in the bundle"),
        ("initrd = \"a\\u0000\"", "10: initrd = \"a\\u0000\" is not the name of a file in the bundle"),
        ("initrd = [\"a\"]", "10: initrd = [\"a\"] is not the name of a file in the bundle"),
        ("modules = \"a\"", "11: modules = \"a\" is not a list of modules; write [\"FILE ARGUMENTS\"]"),
        ("modules = [\"a\", 1]", "17: 1 in modules does not begin with the name of a file in the bundle"),
        ("modules = [\" a\"]", "12: \" a\" in modules does not begin with the name of a file in the bundle"),
        ("modules = [\"a \\u0000\"]", "12: a module contains a NUL, which would end it early; remove it"),
        (&long_module, "12: a module has 2049 bytes; shorten it to 2047"),
    ]);
    assert_eq!(
        error("[[vm]]\nname = \"a\"\nmemory = \"1M\"\nkernel = \"\""),
        "umbra.toml:4:10: kernel = \"\" is not the name of a file in the bundle"
    );
}

#[test]
fn the_longest_command_line_is_taken() {
    let cmdline = "x".repeat(MAX_CMDLINE);
    let text = format!("[[vm]]\nname = \"a\"\nmemory = \"1M\"\nkernel = \"k\"\ncmdline = \"{cmdline}\"");
    assert_eq!(Config::parse("f", &text).unwrap().vms[0].cmdline, cmdline);
}

#[test]
fn columns_count_characters() {
    assert_eq!(
        error("[[vm]]\r\nname = \"a\"\r\n\"mem\\u006fry\" = \"é12Q\"\r\nkernel = \"k\""),
        "umbra.toml:3:17: memory = \"é12Q\" is not a size; write a number with K, M or G, such as \"512M\""
    );
    assert_eq!(error("\u{feff}[[vm]]"), "umbra.toml:1:2: this VM has no name; add name = \"NAME\"");
}

#[test]
fn nesting_ends_in_an_error() {
    let deep = "nested too deep; umbra.toml has sections of plain keys and values";
    vm_errors(&[
        (&format!("vcpus = {}", "[".repeat(20_000)), &format!("17: {deep}")),
        (&format!("vcpus = {}", "{a=".repeat(20_000)), &format!("33: {deep}")),
        (&format!("vcpus = {}", "[}".repeat(20_000)), &format!("25: {deep}")),
        (&format!("vcpus{} = 1", ".a".repeat(20_000)), &format!("22: {deep}")),
        (&format!("[vm{}]", ".a".repeat(20_000)), &format!("20: {deep}")),
        // What looks deep in a text or a comment is not.
        (
            &format!("mmu = \"{}\" # {}", "[.".repeat(9), "[.".repeat(9)),
            "7: mmu = \"[.[.[.[.[.[.[.[.[.\" is not a kind of MMU; write \"direct\" or \"shadow\"",
        ),
    ]);
    // The deepest that is parsed, on a stack like a kernel's.
    let text = format!("a = {}{}", "[".repeat(depth::LIMIT), "]".repeat(depth::LIMIT));
    let parser = std::thread::Builder::new().stack_size(256 << 10).spawn(move || error(&text)).unwrap();
    assert_eq!(parser.join().unwrap(), "umbra.toml:1:1: unknown key \"a\", expected \"umbra\" or \"vm\"");
}

#[test]
fn huge_files_are_refused_unread() {
    assert_eq!(error(&" ".repeat(MAX_FILE_BYTES + 1)), "umbra.toml has 65537 bytes; at most 65536 are read");
}

#[test]
fn sizes() {
    assert_eq!(parse_size("64K"), Ok(64 << 10));
    assert_eq!(parse_size("512m"), Ok(512 << 20));
    assert_eq!(parse_size("0G"), Ok(0));
    assert_eq!(parse_size("17179869183G"), Ok(0xffff_ffff_c000_0000));
    for text in ["17179869184G", "", "K", "1", "1T", "1KB", "1Ké", "0x1K", "1_000K", " 1K"] {
        assert_eq!(parse_size(text), Err(SizeError), "{text}");
    }
}

fn bundle(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut writer = Writer::new();
    for (name, data) in files {
        writer.file(name, 0o644, data).unwrap();
    }
    writer.finish()
}

fn load(files: &[(&str, &[u8])]) -> Result<Config, String> {
    Config::load(&Bundle::new(&bundle(files)).unwrap()).map_err(|error| error.to_string())
}

#[test]
fn files_must_be_in_the_bundle() {
    let toml =
        b"[[vm]]\nname = \"a\"\nmemory = \"1M\"\nkernel = \"./k\"\ninitrd = \"i\"\nmodules = [\n  \"m x\"]\n";
    let all: [(&str, &[u8]); 4] = [("umbra.toml", toml), ("k", b"1"), ("./i", b"2"), ("m", b"3")];
    assert_eq!(load(&all).unwrap().vms.len(), 1);
    let without = |missing: &str| {
        let rest: Vec<_> = all.iter().copied().filter(|(name, _)| *name != missing).collect();
        load(&rest).unwrap_err()
    };
    let not_there = "which is not in the bundle; add it or correct the name";
    assert_eq!(without("k"), format!("umbra.toml:4:10: kernel names \"./k\", {not_there}"));
    assert_eq!(without("./i"), format!("umbra.toml:5:10: initrd names \"i\", {not_there}"));
    assert_eq!(without("m"), format!("umbra.toml:7:3: modules names \"m\", {not_there}"));
    assert_eq!(without("umbra.toml"), "umbra.toml is not in the bundle; put one at its top level");
}

#[test]
fn other_encodings_are_refused() {
    assert_eq!(
        load(&[("umbra.toml", b"[[vm]]\nname = \"\xe9\"")]).unwrap_err(),
        "umbra.toml:2:9: the byte 0xe9 is not UTF-8 text; save the file as UTF-8"
    );
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in "\\PC{0,200}") {
        let _ = Config::parse("f", &text);
    }

    #[test]
    fn any_toml_like_text_is_read_or_refused(
        words in prop::collection::vec(
            prop_oneof![
                Just("[[vm]]"), Just("[vm]"), Just("[umbra]"), Just("\n"), Just("name"), Just("memory"), Just("kernel"),
                Just("modules"), Just("="), Just("\"1M\""), Just("'a'"), Just("\"\"\""), Just("["), Just("]"), Just("{"),
                Just("}"), Just(","), Just("."), Just("#"), Just("1"), Just("\u{0}"), Just("é"), Just("\\"), Just("\r"),
            ],
            0..60),
    ) {
        let _ = Config::parse("f", &words.concat());
    }

    #[test]
    fn any_size_is_read_or_refused(text in "[0-9]{0,21}[KMGkmgT ]?") {
        if let Ok(bytes) = parse_size(&text) {
            prop_assert_eq!(bytes % 1024, 0);
        }
    }
}
