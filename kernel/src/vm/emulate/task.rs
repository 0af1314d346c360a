//! Hardware task switches. Intel SDM vol. 3, chapter 7; AMD APM vol. 2, chapter 12.
//!
//! Up to the commit point a fault belongs to the old task and nothing has happened. From there on the CPU is in
//! the new task, and what its segments, its limit or its stack get wrong is an exception there.
use super::change::{Change, Stack, GP, NP, TS};
use super::cpu::{AccessKind, Cpu, Exception, Fault, Mode};
use super::decode::Gpr;
use super::flags::{DEFINED, NT, RF, VM};
use super::segment::{is_null, rpl, system_type, BUSY};
use super::Outcome;
use crate::hw::{Segment, SegmentName, TaskSwitchCause};
use crate::vm::control_regs::{self, Flush, Now, CR0_PG, CR0_TS};

/// DR6: the debug exception is due to the T flag of a TSS.
const DR6_BT: u64 = 1 << 15;
/// DR7: L0 to L3 and LE, which a task switch clears.
const DR7_LOCAL: u64 = 0x155;
/// Attempts to load the segments of the new task while other CPUs are in the way.
const TRIES: usize = 16;

/// A task switch whose cause has been granted: the rights to use a TSS descriptor or gate are not looked at again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TaskSwitch {
    /// Selector of the new TSS.
    pub selector: u16,
    /// What causes it.
    pub cause: TaskSwitchCause,
    /// Where the old task will go on.
    pub next_rip: u64,
    /// Error code of the exception that came through a task gate.
    pub error_code: Option<u32>,
    /// An exception, an interrupt or an NMI causes it: error codes have EXT set.
    pub external: bool,
}

/// Layout of a TSS. SDM vol. 3, figures 7-2 and 7-10.
struct Layout {
    /// Least limit.
    limit: u32,
    /// Bytes of a register.
    size: u8,
    rip: u64,
    rflags: u64,
    gprs: u64,
    segments: u64,
    /// Distance of segment selectors.
    stride: u64,
    /// ES, CS, SS, DS, and in a 32-bit TSS FS and GS.
    segment_count: u64,
    ldt: u64,
}

const LAYOUT_32: Layout = Layout {
    limit: 0x67,
    size: 4,
    rip: 0x20,
    rflags: 0x24,
    gprs: 0x28,
    segments: 0x48,
    stride: 4,
    segment_count: 6,
    ldt: 0x60,
};
const LAYOUT_16: Layout = Layout {
    limit: 0x2b,
    size: 2,
    rip: 0xe,
    rflags: 0x10,
    gprs: 0x12,
    segments: 0x22,
    stride: 2,
    segment_count: 4,
    ldt: 0x2a,
};
/// CR3 and the T flag, in a 32-bit TSS only.
const CR3: u64 = 0x1c;
const TRAP: u64 = 0x64;

/// In the order of both TSSs and instruction encodings.
const SEGMENTS: [SegmentName; 6] =
    [SegmentName::Es, SegmentName::Cs, SegmentName::Ss, SegmentName::Ds, SegmentName::Fs, SegmentName::Gs];

fn layout(attributes: u16) -> &'static Layout {
    if attributes & 8 != 0 {
        &LAYOUT_32
    } else {
        &LAYOUT_16
    }
}

/// What a TSS holds.
struct Image {
    rip: u64,
    rflags: u64,
    gprs: [u64; 8],
    selectors: [u16; 6],
    ldt: u16,
    cr3: u64,
    trap: bool,
    /// Bytes of a register.
    size: u8,
}

/// What the new task's CR3 asks for.
struct Tables {
    flush: Flush,
    pdptes: Option<[u64; 4]>,
}

/// Switches tasks. An error: nothing happened.
pub(super) fn switch<C: Cpu>(cpu: &mut C, switch: &TaskSwitch) -> Result<Outcome, Fault> {
    let image = leave(cpu, switch)?;
    // The CPU is in the new task.
    for _ in 0..TRIES {
        match arrive(cpu, switch, &image) {
            Ok(()) if image.trap => {
                let trap = Exception { vector: 1, error_code: None, cr2: None };
                return Ok(Outcome::Exception(trap));
            }
            Ok(()) => return Ok(Outcome::Done { trap: false }),
            Err(Fault::Exception(exception)) => {
                let rflags = cpu.rflags();
                cpu.set_rflags(rflags | RF);
                return Ok(Outcome::Exception(exception));
            }
            Err(Fault::Retry) => {}
            Err(fault) => return Err(fault),
        }
    }
    Err(Fault::Unsupported("task switch whose descriptors are being changed all the time"))
}

/// Everything up to the commit point and beyond: saves the old task, loads the registers of the new one and its
/// selectors, without their descriptors. SDM vol. 3, 7.3, steps 1 to 12.
fn leave<C: Cpu>(cpu: &mut C, switch: &TaskSwitch) -> Result<Image, Fault> {
    use system_type::{BUSY_TSS, BUSY_TSS_16, TSS, TSS_16};
    let TaskSwitch { selector, cause, next_rip, .. } = *switch;
    let mut change = Change::new(cpu);
    change.external = u32::from(switch.external);
    let invalid = if cause == TaskSwitchCause::Iret { TS } else { GP };
    if change.mode == Mode::Real || change.long_mode() || selector & 4 != 0 || is_null(selector) {
        return Err(change.selector_fault(invalid, selector));
    }
    let descriptor = change.descriptor(selector, invalid)?;
    let expected = if cause == TaskSwitchCause::Iret { [BUSY_TSS, BUSY_TSS_16] } else { [TSS, TSS_16] };
    if descriptor.is_segment() || !expected.contains(&descriptor.kind()) {
        return Err(change.selector_fault(invalid, selector));
    }
    if !descriptor.is_present() {
        return Err(change.selector_fault(NP, selector));
    }
    let task = descriptor.segment(selector);
    let image = change.read_image(&task)?;
    let old_task = change.state.tr;
    change.save_old_task(&old_task, cause, next_rip)?;
    if matches!(cause, TaskSwitchCause::Jump | TaskSwitchCause::Iret) {
        if let Some(old) = change.try_descriptor(old_task.selector)? {
            change.leave_task(&old);
        }
    }
    if cause != TaskSwitchCause::Iret {
        change.mark(&descriptor, BUSY)?;
    }
    let nested = matches!(cause, TaskSwitchCause::Call | TaskSwitchCause::Gate);
    if nested {
        let link = change.field(&task, 0, 2)?;
        change.write(link, 2, old_task.selector.into(), AccessKind::SystemWrite)?;
    }
    let Tables { flush, pdptes } = change.load_cr3(&task, image.cr3)?;
    let state = &mut change.state;
    state.tr = Segment { attributes: task.attributes | u16::from(BUSY), ..task };
    state.cr0 |= CR0_TS;
    state.dr7 &= !DR7_LOCAL;
    state.rip = image.rip;
    state.rflags = image.rflags & DEFINED | 2 | if nested { NT } else { 0 };
    state.ldtr = Segment { selector: image.ldt, ..Segment::default() };
    let vm86 = image.rflags & VM != 0;
    let level = if vm86 { 3 } else { u16::from(rpl(image.selectors[SegmentName::Cs as usize])) };
    for name in SEGMENTS {
        let selector = image.selectors[name as usize];
        let segment = &mut state.segments[name as usize];
        *segment = match name {
            _ if vm86 => Segment::real_mode(selector, 0xf3),
            // No instruction runs in it before it is loaded or an exception is taken, but the level is there already.
            // Its granularity goes with its limit, or the processor would refuse to take that exception.
            SegmentName::Cs => {
                Segment { selector, attributes: segment.attributes & 0xf00 | 0x9b | level << 5, ..*segment }
            }
            SegmentName::Ss => Segment { selector, attributes: level << 5, ..Segment::default() },
            _ => Segment { selector, ..Segment::default() },
        };
    }
    change.rsp = image.gprs[Gpr::Rsp as usize];
    let cpu = change.commit()?;
    for (gpr, value) in Gpr::ALL.into_iter().zip(image.gprs) {
        cpu.set_gpr(gpr, value);
    }
    if flush != Flush::None {
        cpu.flush();
    }
    if let Some(pdptes) = pdptes {
        cpu.set_pdptes(pdptes);
    }
    cpu.clear_interrupt_shadow();
    Ok(image)
}

/// Loads the descriptors of the new task and pushes an error code. SDM vol. 3, table 7-1.
fn arrive<C: Cpu>(cpu: &mut C, switch: &TaskSwitch, image: &Image) -> Result<(), Fault> {
    let mut change = Change::new(cpu);
    change.external = u32::from(switch.external);
    if image.trap {
        change.state.dr6 |= DR6_BT;
    }
    change.load_ldt(image.ldt)?;
    if change.mode == Mode::Vm86 {
        change.push_error_code(switch, image.size)?;
        if image.rip > 0xffff {
            return Err(change.fault(GP, 0));
        }
        return change.commit().map(|_| ());
    }
    let selector = image.selectors[SegmentName::Cs as usize];
    let level = rpl(selector);
    if is_null(selector) {
        return Err(change.selector_fault(TS, selector));
    }
    let code = change.descriptor(selector, TS)?;
    let level_fits = if code.is_conforming() { code.dpl() <= level } else { code.dpl() == level };
    if !code.is_code() || !level_fits {
        return Err(change.selector_fault(TS, selector));
    }
    if !code.is_present() {
        return Err(change.selector_fault(NP, selector));
    }
    change.load_stack_segment(image.selectors[SegmentName::Ss as usize], level, TS, false)?;
    for name in [SegmentName::Ds, SegmentName::Es, SegmentName::Fs, SegmentName::Gs] {
        change.load_data_segment(name, image.selectors[name as usize], level, TS)?;
    }
    change.push_error_code(switch, image.size)?;
    change.load_code(selector, &code, level, image.rip)?;
    change.commit().map(|_| ())
}

impl<C: Cpu> Change<'_, C> {
    /// Linear address of a field of a TSS.
    fn field(&self, task: &Segment, offset: u64, size: u8) -> Result<u64, Fault> {
        let inside = offset + u64::from(size) - 1 <= u64::from(task.limit);
        let linear = if inside { self.table_address(task.base, offset, size) } else { None };
        linear.ok_or_else(|| self.selector_fault(TS, task.selector))
    }

    fn read_field(&mut self, task: &Segment, offset: u64, size: u8) -> Result<u64, Fault> {
        let linear = self.field(task, offset, size)?;
        self.read_system(linear, size)
    }

    fn read_image(&mut self, task: &Segment) -> Result<Image, Fault> {
        let layout = layout(task.attributes);
        if task.limit < layout.limit {
            return Err(self.selector_fault(TS, task.selector));
        }
        let size = layout.size;
        let mut gprs = [0; 8];
        for (index, gpr) in gprs.iter_mut().enumerate() {
            *gpr = self.read_field(task, layout.gprs + index as u64 * u64::from(size), size)?;
        }
        let mut selectors = [0; 6];
        for index in 0..layout.segment_count {
            let selector = self.read_field(task, layout.segments + index * layout.stride, 2)?;
            selectors[index as usize] = selector as u16;
        }
        let wide = size == 4;
        Ok(Image {
            rip: self.read_field(task, layout.rip, size)?,
            rflags: self.read_field(task, layout.rflags, size)?,
            gprs,
            selectors,
            ldt: self.read_field(task, layout.ldt, 2)? as u16,
            cr3: if wide { self.read_field(task, CR3, 4)? } else { 0 },
            trap: wide && self.read_field(task, TRAP, 2)? & 1 != 0,
            size,
        })
    }

    /// Plans to save the registers in the TSS of the task that is left.
    fn save_old_task(&mut self, task: &Segment, cause: TaskSwitchCause, next_rip: u64) -> Result<(), Fault> {
        let layout = layout(task.attributes);
        let size = layout.size;
        let mut rflags = self.state.rflags;
        if cause == TaskSwitchCause::Iret {
            rflags &= !NT;
        }
        let save = |change: &mut Self, offset, size, value| {
            let linear = change.field(task, offset, size)?;
            change.write(linear, size, value, AccessKind::SystemWrite)
        };
        save(self, layout.rip, size, next_rip)?;
        save(self, layout.rflags, size, rflags)?;
        for (index, gpr) in Gpr::ALL.into_iter().take(8).enumerate() {
            let value = self.cpu.gpr(gpr);
            save(self, layout.gprs + index as u64 * u64::from(size), size, value)?;
        }
        for name in SEGMENTS.into_iter().take(layout.segment_count as usize) {
            let selector = self.segment(name).selector;
            save(self, layout.segments + name as u64 * layout.stride, 2, selector.into())?;
        }
        Ok(())
    }

    /// CR3 from a 32-bit TSS while paging: what is to be flushed, and the PDPTEs to be loaded.
    fn load_cr3(&mut self, task: &Segment, cr3: u64) -> Result<Tables, Fault> {
        if task.attributes & 8 == 0 || self.state.cr0 & CR0_PG == 0 {
            return Ok(Tables { flush: Flush::None, pdptes: None });
        }
        let limits = self.cpu.limits();
        let now = Now::from(&self.state);
        let invalid = self.selector_fault(TS, task.selector);
        let written = control_regs::write_cr3(&now, cr3, &limits).map_err(|_| invalid)?;
        self.state.cr3 = written.cr3;
        if !written.load_pdptes {
            return Ok(Tables { flush: written.flush, pdptes: None });
        }
        let pdptes = self.cpu.read_pdptes(cr3);
        if pdptes.is_some_and(|pdptes| !control_regs::pdptes_are_valid(&pdptes, limits.phys_bits)) {
            return Err(invalid);
        }
        Ok(Tables { flush: written.flush, pdptes })
    }

    /// LDTR of the new task.
    fn load_ldt(&mut self, selector: u16) -> Result<(), Fault> {
        if is_null(selector) {
            return Ok(());
        }
        if selector & 4 != 0 {
            return Err(self.selector_fault(TS, selector));
        }
        let descriptor = self.descriptor(selector, TS)?;
        if !descriptor.is_system(system_type::LDT) || !descriptor.is_present() {
            return Err(self.selector_fault(TS, selector));
        }
        self.state.ldtr = descriptor.segment(selector);
        Ok(())
    }

    /// The error code of the exception that came through the task gate, on the new stack.
    fn push_error_code(&mut self, switch: &TaskSwitch, size: u8) -> Result<(), Fault> {
        let Some(error_code) = switch.error_code else { return Ok(()) };
        let segment = self.segment(SegmentName::Ss);
        let width = if segment.attributes & Segment::DEFAULT_32 != 0 { 4 } else { 2 };
        let mut stack = Stack { segment, width, pointer: self.rsp, level: self.cpl, code: 0 };
        self.push(&mut stack, size, error_code.into())?;
        self.rsp = stack.pointer;
        Ok(())
    }
}
