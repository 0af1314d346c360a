//! From the shape that serde saw to a checked configuration.
use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::ops::Range;

use super::depth;
use super::raw::{self, Item, Placed, Value};
use super::{
    parse_size, AtEnd, Config, Console, Error, FileName, MmuMode, Module, OnReset, PageSize, Position,
    SizeError, Vm, MAX_CMDLINE, MAX_FILE_BYTES, MAX_MEMORY, MAX_NAME, MAX_VCPUS, MEMORY_GRANULE, MIN_MEMORY,
};

const SWITCH: &str = "true or false";
const A_FILE: &str = "the name of a file in the bundle";

pub(super) fn config(file: &str, text: &str) -> Result<Config, Error> {
    let source = Source { file, text };
    if text.len() > MAX_FILE_BYTES {
        let message = format!("has {} bytes; at most {MAX_FILE_BYTES} are read", text.len());
        return Err(Error::whole_file(file, message));
    }
    if let Some(offset) = depth::too_deep(text) {
        let message = "nested too deep; umbra.toml has sections of plain keys and values".into();
        return Err(Error::at(file, Position::of(text, offset), message));
    }
    let raw: raw::File = toml::from_str(text).map_err(|error| source.syntax_error(&error))?;

    let (at_end, console) = raw.umbra.map_or((None, None), |umbra| (umbra.0.at_end, umbra.0.console));
    let console = source.console(console)?;
    let at_end = source.choice(
        "at_end",
        at_end,
        "a way to end",
        &[("poweroff", AtEnd::PowerOff), ("halt", AtEnd::Halt)],
    )?;
    let mut vms: Vec<(Vm, Range<usize>)> = Vec::new();
    for raw in raw.vm.0 {
        let (vm, name_span) = source.vm(raw)?;
        if let Some((_, taken)) = vms.iter().find(|(other, _)| other.name == vm.name) {
            let line = Position::of(text, taken.start).line;
            return Err(source.bad(
                "name",
                &name_span,
                &format!("taken by the VM of line {line}; give each its own"),
            ));
        }
        vms.push((vm, name_span));
    }
    if vms.is_empty() {
        let message = "no VM is described; add a section [[vm]] with name, memory and kernel".into();
        return Err(Error::at(file, Position::of(text, 0), message));
    }
    Ok(Config { at_end, console, vms: vms.into_iter().map(|(vm, _)| vm).collect(), file: file.to_owned() })
}

/// The text under the reader's finger.
struct Source<'a> {
    file: &'a str,
    text: &'a str,
}

impl Source<'_> {
    fn vm(&self, raw: toml::Spanned<raw::Section<raw::Vm>>) -> Result<(Vm, Range<usize>), Error> {
        let section = raw.span();
        let raw = raw.into_inner().0;
        let name = raw
            .name
            .ok_or_else(|| self.error(&section, "this VM has no name; add name = \"NAME\"".into()))?;
        let name_span = name.span();
        let name = self.value(
            "name",
            name,
            &format!("a name; write 1 to {MAX_NAME} letters, digits, -, _ or ."),
            name_text,
        )?;
        let missing = |what: &str| self.error(&section, format!("the VM {name:?} has no {what}"));

        let memory = raw.memory.ok_or_else(|| missing("memory; add a size, such as memory = \"512M\""))?;
        let kernel =
            raw.kernel.ok_or_else(|| missing("kernel; add kernel = \"FILE\", a file in the bundle"))?;
        let vcpus = optional(raw.vcpus, |value| {
            let wanted = format!("a number of virtual CPUs; write 1 to {MAX_VCPUS}");
            self.value("vcpus", value, &wanted, |value| integer(value, 1..=i64::from(MAX_VCPUS)))
        })?;
        let exit_port = optional(raw.exit_port, |value| {
            let wanted = "an I/O port; write a number from 1 to 0xffff";
            self.value("exit_port", value, wanted, |value| integer(value, 1..=0xffff))
        })?;
        let mmu_kinds = [("direct", MmuMode::Direct), ("shadow", MmuMode::Shadow)];
        let mmu = self.choice("mmu", raw.mmu, "a kind of MMU", &mmu_kinds)?;
        let page_sizes = [
            ("auto", PageSize::Auto),
            ("4K", PageSize::Size4K),
            ("2M", PageSize::Size2M),
            ("1G", PageSize::Size1G),
        ];
        let resets = [("restart", OnReset::Restart), ("stop", OnReset::Stop)];
        let vm = Vm {
            vcpus: vcpus.map_or(1, |vcpus: u32| vcpus),
            memory_bytes: self.memory(memory)?,
            kernel: self.file_name("kernel", kernel)?,
            initrd: optional(raw.initrd, |value| self.file_name("initrd", value))?,
            modules: optional(raw.modules, |value| self.modules(value))?.unwrap_or_default(),
            cmdline: optional(raw.cmdline, |value| self.cmdline(value))?.unwrap_or_default(),
            mmu,
            nested: self.nested(raw.nested, mmu)?,
            page_size: self.choice("page_size", raw.page_size, "a page size", &page_sizes)?,
            exit_port,
            on_reset: self.choice("on_reset", raw.on_reset, "an answer to a reset", &resets)?,
            console: optional(raw.console, |value| self.value("console", value, SWITCH, boolean))?
                .unwrap_or(true),
            name,
        };
        Ok((vm, name_span))
    }

    fn memory(&self, value: Placed) -> Result<u64, Error> {
        let span = value.span();
        let bytes = self.value("memory", value, SizeError::WANTED, |value| parse_size(&text(value)?).ok())?;
        if bytes < MIN_MEMORY {
            return Err(self.bad("memory", &span, "too little; write \"1M\" or more"));
        }
        if bytes > MAX_MEMORY {
            return Err(self.bad("memory", &span, "more than a VM can have; write \"65536G\" or less"));
        }
        if !bytes.is_multiple_of(MEMORY_GRANULE) {
            return Err(self.bad("memory", &span, "not whole pages; write a multiple of \"4K\""));
        }
        Ok(bytes)
    }

    fn file_name(&self, key: &'static str, value: Placed) -> Result<FileName, Error> {
        let position = Position::of(self.text, value.span().start);
        let name = self.value(key, value, A_FILE, |value| text(value).filter(|name| is_file_name(name)))?;
        Ok(FileName { name, position, key })
    }

    fn modules(&self, value: Placed) -> Result<Vec<Module>, Error> {
        let wanted = "a list of modules; write [\"FILE ARGUMENTS\"]";
        let items = self.value("modules", value, wanted, |value| match value {
            Value::List(items) => Some(items),
            _ => None,
        })?;
        items.into_iter().map(|item| self.module(item)).collect()
    }

    fn module(&self, item: toml::Spanned<Item>) -> Result<Module, Error> {
        let span = item.span();
        let bad =
            || self.error(&span, format!("{} in modules does not begin with {A_FILE}", self.quote(&span)));
        let Item::Text(cmdline) = item.into_inner() else { return Err(bad()) };
        self.check_cmdline("a module", &cmdline, &span)?;
        let name = cmdline.split(' ').next().filter(|name| is_file_name(name)).ok_or_else(bad)?.to_owned();
        let file = FileName { name, position: Position::of(self.text, span.start), key: "modules" };
        Ok(Module { file, cmdline })
    }

    fn cmdline(&self, value: Placed) -> Result<String, Error> {
        let span = value.span();
        let cmdline = self.value("cmdline", value, "a text in quotes", text)?;
        self.check_cmdline("cmdline", &cmdline, &span)?;
        Ok(cmdline)
    }

    fn check_cmdline(&self, what: &str, cmdline: &str, span: &Range<usize>) -> Result<(), Error> {
        if cmdline.contains('\0') {
            return Err(
                self.error(span, format!("{what} contains a NUL, which would end it early; remove it"))
            );
        }
        if cmdline.len() > MAX_CMDLINE {
            let len = cmdline.len();
            return Err(self.error(span, format!("{what} has {len} bytes; shorten it to {MAX_CMDLINE}")));
        }
        Ok(())
    }

    /// The devices of the console; all that are usual if the key is absent.
    fn console(&self, value: Option<Placed>) -> Result<Vec<Console>, Error> {
        const WANTED: &str = "a list of consoles; write some of \"com1\", \"com2\", \"framebuffer\"";
        let Some(value) = value else { return Ok(Vec::from([Console::Com1, Console::Framebuffer])) };
        let whole = value.span();
        let list = self.value("console", value, WANTED, |value| match value {
            Value::List(list) if !list.is_empty() => Some(list),
            _ => None,
        })?;
        let mut consoles = Vec::new();
        for item in list {
            let span = item.span();
            let console = match item.into_inner() {
                Item::Text(name) if name == "com1" => Console::Com1,
                Item::Text(name) if name == "com2" => Console::Com2,
                Item::Text(name) if name == "framebuffer" => Console::Framebuffer,
                _ => {
                    let what = self.quote(&span);
                    let message = format!(
                        "console has {what}, which is none; write \"com1\", \"com2\" or \"framebuffer\""
                    );
                    return Err(self.error(&span, message));
                }
            };
            if consoles.contains(&console) {
                return Err(self.bad("console", &whole, "one console twice; name each once"));
            }
            consoles.push(console);
        }
        Ok(consoles)
    }

    fn nested(&self, value: Option<Placed>, mmu: MmuMode) -> Result<bool, Error> {
        let Some(value) = value else { return Ok(false) };
        let span = value.span();
        let nested = self.value("nested", value, SWITCH, boolean)?;
        if nested && mmu != MmuMode::Direct {
            return Err(self.bad("nested", &span, "possible only with mmu = \"direct\"; change one of them"));
        }
        Ok(nested)
    }

    /// A value out of a few words; the type's default if the key is absent.
    fn choice<T: Copy + Default>(
        &self,
        key: &str,
        value: Option<Placed>,
        what: &str,
        choices: &[(&str, T)],
    ) -> Result<T, Error> {
        let Some(value) = value else { return Ok(T::default()) };
        let mut wanted = format!("{what}; write ");
        for (index, (word, _)) in choices.iter().enumerate() {
            let separator = match index {
                0 => "",
                index if index + 1 == choices.len() => " or ",
                _ => ", ",
            };
            wanted += &format!("{separator}{word:?}");
        }
        self.value(key, value, &wanted, |value| {
            let word = text(value)?;
            choices.iter().find(|choice| choice.0 == word).map(|choice| choice.1)
        })
    }

    /// A value that `convert` accepts, or an error that says what was wanted.
    fn value<T>(
        &self,
        key: &str,
        value: Placed,
        wanted: &str,
        convert: impl FnOnce(Value) -> Option<T>,
    ) -> Result<T, Error> {
        let span = value.span();
        convert(value.into_inner()).ok_or_else(|| self.bad(key, &span, &format!("not {wanted}")))
    }

    fn bad(&self, key: &str, span: &Range<usize>, why: &str) -> Error {
        self.error(span, format!("{key} = {} is {why}", self.quote(span)))
    }

    fn error(&self, span: &Range<usize>, message: String) -> Error {
        Error::at(self.file, Position::of(self.text, span.start), message)
    }

    /// The text itself, or its beginning if it is long.
    fn quote(&self, span: &Range<usize>) -> String {
        const LONG: usize = 60;
        let whole = self.text.get(span.clone()).unwrap_or_default();
        let line = whole.lines().next().unwrap_or_default();
        let mut short: String = line.chars().take(LONG).collect();
        if short.len() < whole.len() {
            short.push('…');
        }
        short
    }

    fn syntax_error(&self, error: &toml::de::Error) -> Error {
        let span = error.span().unwrap_or(self.text.len()..self.text.len());
        let message = error.message();
        let message = if message == "duplicate key" {
            format!("the key {:?} is given twice; remove one", self.quote(&span))
        } else if let Some(rest) = message.strip_prefix("unknown field ") {
            format!("unknown key {rest}")
        } else if let Some(rest) = message.strip_prefix("invalid type: ") {
            format!("found {rest}")
        } else {
            message.to_owned()
        };
        self.error(&span, message.replace('`', "\"").replace('\n', "; "))
    }
}

/// Reads a key that may be absent.
fn optional<T>(
    value: Option<Placed>,
    read: impl FnOnce(Placed) -> Result<T, Error>,
) -> Result<Option<T>, Error> {
    value.map(read).transpose()
}

fn text(value: Value) -> Option<String> {
    match value {
        Value::Text(text) => Some(text),
        _ => None,
    }
}

fn boolean(value: Value) -> Option<bool> {
    match value {
        Value::Boolean(boolean) => Some(boolean),
        _ => None,
    }
}

fn integer<T: TryFrom<i64>>(value: Value, range: core::ops::RangeInclusive<i64>) -> Option<T> {
    match value {
        Value::Integer(integer) if range.contains(&integer) => integer.try_into().ok(),
        _ => None,
    }
}

fn name_text(value: Value) -> Option<String> {
    let is_good = |name: &String| {
        let good_byte = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(good_byte)
    };
    text(value).filter(is_good)
}

fn is_file_name(name: &str) -> bool {
    !name.is_empty() && !name.contains('\0')
}
