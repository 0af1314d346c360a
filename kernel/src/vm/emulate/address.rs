//! From an operand to a checked linear address: effective address, segmentation, canonical form, alignment.
use super::cpu::{AccessKind, Cpu, Exception, Mode, Segment};
use super::decode::{Address, Base, Gpr, Seg};
use super::execute::Execution;
use super::flags::{mask, AC};
use crate::vm::control_regs::CR0_AM;

/// Whether an address is the sign extension of its `implemented` bits.
#[inline]
pub(super) fn is_canonical(linear: u64, implemented: u32) -> bool {
    let unused = 64_u32.wrapping_sub(implemented);
    (linear.wrapping_shl(unused) as i64).wrapping_shr(unused) as u64 == linear
}

impl<C: Cpu> Execution<'_, C> {
    /// Offset of the memory operand in its segment. `rsp_bias` is added to RSP where it is the base (POP computes its
    /// destination after incrementing RSP).
    #[inline]
    pub(super) fn offset(&self, rsp_bias: u64) -> u64 {
        let Address { base, index, scale, size, displacement, .. } = self.insn.mem;
        let mut offset = displacement;
        match base {
            Base::Reg(Gpr::Rsp) => {
                offset = offset.wrapping_add(self.cpu.gpr(Gpr::Rsp)).wrapping_add(rsp_bias)
            }
            Base::Reg(gpr) => offset = offset.wrapping_add(self.cpu.gpr(gpr)),
            Base::Rip => offset = offset.wrapping_add(self.cpu.rip()),
            Base::None => {}
        }
        if let Some(index) = index {
            offset = offset.wrapping_add(self.cpu.gpr(index) << (scale & 3));
        }
        offset & mask(size)
    }

    /// Linear address of the memory operand for an access of `size` bytes.
    #[inline]
    pub(super) fn operand_address(&self, size: u8, kind: AccessKind) -> Result<u64, Exception> {
        self.linear(self.insn.mem.seg, self.offset(0), size, kind)
    }

    /// Linear address of `size` bytes at `offset` in `seg`, or the exception of segmentation (AMD APM vol. 2, 4.12),
    /// of a non-canonical address (5.3.1), or of alignment checking (8.2.17).
    #[inline]
    pub(super) fn linear(&self, seg: Seg, offset: u64, size: u8, kind: AccessKind) -> Result<u64, Exception> {
        let last = u64::from(size.max(1)) - 1;
        let linear = if self.mode == Mode::Long64 {
            let base = if matches!(seg, Seg::Fs | Seg::Gs) { self.cpu.segment(seg).base } else { 0 };
            let linear = base.wrapping_add(offset);
            // A page is canonical as a whole.
            let one_page = linear & 0xfff <= 0x1000 - 1 - last;
            if !self.canonical(linear) || !(one_page || self.canonical_end(linear, last)) {
                return Err(self.segment_fault(seg));
            }
            linear
        } else {
            let segment = self.cpu.segment(seg);
            if !self.within(&segment, offset, last, kind) {
                return Err(self.segment_fault(seg));
            }
            let linear = segment.base.wrapping_add(offset) & mask(4);
            // Wrapping around 4 GiB inside an access: the manuals allow an exception.
            if linear + last > mask(4) {
                return Err(self.segment_fault(seg));
            }
            linear
        };
        if linear & last != 0 && self.checks_alignment() {
            return Err(Exception { vector: 17, error_code: Some(0), cr2: None });
        }
        Ok(linear)
    }

    /// Whether `offset..=offset + last` may be accessed through `segment`.
    fn within(&self, segment: &Segment, offset: u64, last: u64, kind: AccessKind) -> bool {
        let attributes = segment.attributes;
        let limit = u64::from(segment.limit);
        let Some(end) = offset.checked_add(last) else { return false };
        // The processor loads real-mode segments without looking at a type.
        if !matches!(self.mode, Mode::Real | Mode::Vm86) {
            let allowed = if kind.is_write() { attributes.writable() } else { attributes.readable() };
            if !attributes.present() || !allowed {
                return false;
            }
        }
        if attributes.expand_down() {
            offset > limit && end <= mask(if attributes.big() { 4 } else { 2 })
        } else {
            end <= limit
        }
    }

    /// Whether an address is the sign extension of its implemented bits.
    #[inline]
    pub(super) fn canonical(&self, linear: u64) -> bool {
        is_canonical(linear, self.cpu.linear_bits())
    }

    /// Whether the last byte of an access lies at a canonical address, without wrapping at 2^64.
    #[cold]
    fn canonical_end(&self, linear: u64, last: u64) -> bool {
        linear.checked_add(last).is_some_and(|end| self.canonical(end))
    }

    /// #SS(0) for the stack segment, #GP(0) for others.
    #[cold]
    pub(super) fn segment_fault(&self, seg: Seg) -> Exception {
        self.exception(if seg == Seg::Ss { 12 } else { 13 })
    }

    /// #GP(0).
    #[cold]
    pub(super) fn general_protection(&self) -> Exception {
        self.exception(13)
    }

    fn exception(&self, vector: u8) -> Exception {
        Exception { vector, error_code: (self.mode != Mode::Real).then_some(0), cr2: None }
    }

    fn checks_alignment(&self) -> bool {
        self.cpu.cpl() == 3 && self.cpu.rflags() & AC != 0 && self.cpu.cr0() & CR0_AM != 0
    }
}
