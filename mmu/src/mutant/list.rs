//! The mutants. Those of the kind that has no shadows come first, then those of shadows, vCPUs and nested paging.
mutants! {
    flushes {
        /// A leaf of the direct kind is zapped.
        Zap = "flush_zap" by ["c1_flush"];
        /// A leaf is write-protected.
        Protect = "flush_protect" by ["write_protection_is_lifted"];
        /// A page is tracked.
        Track = "flush_track" by ["tracked_pages"];
        /// A huge page goes because a page of it is tracked.
        TrackHuge = "flush_track_huge" by ["d4_tracked_pages"];
        /// D is taken from a leaf, for the processor to note the next write.
        RearmClean = "flush_rearm_clean" by ["h2_a_write_after_clearing"];
        /// W is taken from a leaf, for the next write to be logged.
        RearmProtect = "flush_rearm_protect" by ["h2_a_write_after_clearing"];
        /// D of a leaf moves to the log.
        Collect = "flush_collect" by ["h1_a_log_misses_no_write"];
        /// A fault takes away a leaf that disagrees with its slot.
        Disagreement = "flush_disagreement" by ["d8_a_leaf_that_disagrees"];
        /// All roots become obsolete.
        InvalidateAll = "flush_invalidate_all" by ["d7_invalidating_all"];
        /// A table is unlinked that was zapped, or made for the fetches from a huge page.
        Unlink = "flush_unlink" by ["c3_tables_come_back"];
        /// A table gives way to a huge page.
        Collapse = "flush_collapse" by ["c3_a_collapsed_table"];
        /// The shadow kind takes a table out.
        ShadowPage = "flush_shadow_page" by ["c3_pages_of_a_shadow"];
        /// Shadow: a leaf is gone, and its record in the reverse map: whoever asks for its frame later does not find it.
        ShadowDropLeaf = "flush_shadow_drop_leaf" by ["c2_every_loss"];
        /// Shadow: a leaf lost W, for its frame is shadowed or to be noticed.
        ShadowProtect = "flush_shadow_protect" by ["c2_every_loss"];
        /// Shadow: a leaf lost W, for the guest's entry has.
        ShadowSync = "flush_shadow_sync" by ["c2_every_loss"];
        /// Shadow: a leaf without W took the place of one with it.
        ShadowReplace = "flush_shadow_replace" by ["c2_every_loss"];
        /// Shadow: a leaf lost W or D, so that the next write is logged.
        ShadowRearm = "flush_shadow_rearm" by ["c2_every_loss"];
        /// Shadow: all roots became obsolete: who runs on one has to leave it.
        ShadowRetire = "flush_shadow_retire" by ["shadow"];
        /// Shadow: the direct kind beside this one took something away.
        ShadowBeside = "flush_shadow_beside" by ["shadow"];
        /// A vCPU loads CR3.
        MovToCr3 = "flush_mov_to_cr3" by ["c5_mov_to_cr3"];
        /// A vCPU turns paging on or off.
        MovToCr0 = "flush_mov_to_cr0" by ["c5_mov_to_cr0"];
        /// A vCPU changes a bit of CR4 that flushes everything.
        MovToCr4 = "flush_mov_to_cr4" by ["c5_mov_to_cr4"];
        /// A vCPU sets CR4.SMEP.
        MovToCr4Smep = "flush_mov_to_cr4_smep" by ["c5_mov_to_cr4"];
        /// A vCPU invalidates an address.
        Invlpg = "flush_invlpg" by ["c5_invlpg"];
        /// A vCPU invalidates an address under a PCID.
        InvpcidAddress = "flush_invpcid_address" by ["c5_invpcid"];
        /// A vCPU invalidates a PCID.
        InvpcidSingle = "flush_invpcid_single" by ["c5_invpcid"];
        /// A vCPU gets a page fault, which invalidates its address.
        PageFault = "flush_page_fault" by ["page_fault", "c8"];
        /// A vCPU flushes everything.
        FlushGuest = "flush_guest" by ["c5_invpcid"];
        /// A vCPU is reset.
        Init = "flush_init" by ["c5_mov_to_cr0"];
        /// A vCPU enters or leaves system-management mode.
        SwitchSmm = "flush_switch_smm" by ["smm"];
        /// Registers are set from outside.
        SetFromOutside = "flush_set_from_outside" by ["registers_set_from_outside"];
        /// A vCPU goes to another root with the same tag.
        RootSwitch = "flush_root_switch" by ["c4_the_tag", "any_sequence"];
        /// An address of the current root is synced.
        BehindAddress = "flush_behind_address" by ["c5_invlpg", "any_sequence"];
        /// The current root is synced.
        BehindAll = "flush_behind_all" by ["any_sequence"];
        /// What L1's tag owes is remembered.
        NoteL1 = "flush_note_l1" by ["c6_what_l1_owes"];
        /// What L2's tag owes is remembered.
        NoteL2 = "flush_note_l2" by ["c6", "c5"];
        /// VM entry without a VPID.
        VmEntry = "flush_vm_entry" by ["c5_without_a_vpid"];
        /// VM exit without a VPID, or with one tag for both.
        VmExit = "flush_vm_exit" by ["c5_without_a_vpid", "c6_one_tag"];
        /// INVVPID of an address.
        InvvpidAddress = "flush_invvpid_address" by ["c5_invvpid"];
        /// INVVPID of a VPID.
        InvvpidSingle = "flush_invvpid_single" by ["c5_invvpid"];
        /// INVVPID of all.
        InvvpidAll = "flush_invvpid_all" by ["c5_invvpid"];
        /// INVEPT of a table.
        InveptSingle = "flush_invept_single" by ["g5_invept"];
        /// INVEPT of all.
        InveptAll = "flush_invept_all" by ["g5", "any_sequence", "invept"];
        /// TLB_CONTROL asks for everything.
        TlbControlAll = "flush_tlb_control_all" by ["c5_tlb_control"];
        /// TLB_CONTROL asks for the ASID.
        TlbControlAsid = "flush_tlb_control_asid" by ["c5_tlb_control"];
        /// #VMEXIT with one tag for both.
        Vmexit = "flush_vmexit" by ["c6_one_tag"];
        /// INVLPGA of L1's ASID.
        InvlpgaL1 = "flush_invlpga_l1" by ["c5_invlpga"];
        /// INVLPGA of an ASID of L2.
        InvlpgaL2 = "flush_invlpga_l2" by ["c5_invlpga"];
        /// L2's tag held translations of another name.
        AnotherName = "flush_another_name" by ["c6_a_new_asid", "c6_another_name"];
        /// A fault that L1's tables cause invalidates its address.
        NestedViolation = "flush_nested_violation" by ["c8_a_violation"];
    }
    bugs {
        /// INVPCID without paging goes where there is nothing.
        NoHookUnpaged = "cve_2022_1789";
        /// A step has its own rights, not those of its parents.
        StepRightsOfItself = "cve_2021_38198.itself";
        /// A step has the rights of the entry above it alone.
        StepRightsOfOneParent = "cve_2021_38198.one_parent";
        /// A walk goes on where an entry cannot be marked because its memory has gone.
        MarkGoneMemory = "cve_2022_1158";
        /// The reserved bits of a large page are not checked.
        LargeReservedBits = "cve_2017_12188.large";
        /// A large page of EPT is checked as a link.
        EptLargeReservedBits = "cve_2017_12188.ept";
        /// NX is taken for reserved although EFER.NXE is set.
        NxAlwaysReserved = "commit_5f0b819995e1";
        /// What EPT permits to fetch counts as readable.
        FetchableIsReadable = "commit_d95c55687e11";
        /// An EPT violation never says that the access was to the linear address's own page.
        LinearNeverFinal = "commit_d0164c161923";
        /// The exit qualification has the rights in another order.
        QualificationOrder = "commit_0780516a18f8";
        /// A nested fault always says that it is about the final address.
        AlwaysFinal = "nested_fault_provenance";
        /// L2's tables that L1 does not map are L2's fault.
        RootOfL2Unmapped = "cve_2026_46032";
        /// CR0.WP is no part of the role.
        WpForgotten = "toggled_cr0_wp";
        /// Long mode without PAE is read as 32-bit paging.
        LongNeedsPae = "cve_2023_30456";
        /// The nested tables of a 32-bit L1 are read as long mode.
        NestedAlwaysLong = "commit_ee6268ba3a68";
        /// The payload of a frozen entry could be a frame.
        FrozenNamesMemory = "cve_2018_3620.frozen";
        /// An access-tracked entry keeps its frame.
        OldNamesMemory = "cve_2018_3620.old";
        /// A leaf that permits fetches alone is made where the CPU has no such thing.
        EptNoExecuteOnly = "commit_d95c55687e11.format";
        /// A leaf is checked as a link.
        FormatLargeReserved = "cve_2017_12188.format";
        /// NX of our own tables is taken for reserved.
        FormatNxReserved = "commit_6c6ab524cfae";
        /// A huge page is executable although that was forbidden.
        HugeExecutable = "cve_2018_12207";
        /// A fetch from a huge page that is not executable maps it huge again.
        FetchKeepsHuge = "cve_2018_12207.fetch";
        /// A page is tracked under one root only.
        TrackFirstRootOnly = "commit_0f38453cdb2e";
        /// A leaf is changed by a store, whatever the processor has set in it meanwhile.
        StoreOverFlags = "e5_a_dirty_bit";
        /// A note about device memory is put over a page.
        NoteOverPage = "cve_2026_23401";
        /// Collapsing does not compare frames.
        CollapseOtherFrame = "cve_2026_23402";
        /// What was resolved before huge pages lost their fetches is mapped executable.
        ForbidKeepsResolved = "cve_2018_12207.resolved";
        /// What was resolved before its backing changed is mapped.
        NeverStale = "cve_2021_22543";
        /// A block that begins before its slot fits it.
        BlockBeforeSlot = "cve_2024_26991";
        /// A block that ends after its slot fits it.
        BlockBeyondSlot = "cve_2024_26991.end";
        /// A block may be huge although it is not inside its slot.
        CollapseBeyondSlot = "commit_ef057cbf825e";
        /// A page is tracked in one address space only.
        TrackOneSpace = "commit_0f38453cdb2e.space";
        /// What was resolved in a slot is mapped when the slot has gone.
        SlotChangeKeepsResolved = "cve_2026_23401.slot";
        /// A link is followed although it leads to the shadow of another table.
        LinkOfOtherTable = "cve_2026_46113";
        /// A link is followed although it leads to a shadow of another role.
        LinkOfOtherRole = "cve_2026_53359";
        /// A table is shadowed with the rights of the levels above the one that leads to it.
        ShadowOfUpperLevels = "cve_2021_38198.shadow";
        /// A table that is unsync is linked and not synced, and nobody knows.
        LinkedUnsynced = "commit_65855ed8b034";
        /// An entry is not read again once its table is tracked.
        StaleEntryShadowed = "commit_f7d9c7b7b902";
        /// Huge entries with other rights share a shadow.
        HugeShadowShared = "commit_d28c6cfbbc5e";
        /// The small pages for a clean huge one are writable.
        CleanHugeWritable = "commit_e09e90a5";
        /// A write to a large page does not make it dirty without CR0.WP.
        LargeNeverDirty = "commit_5fd5387c89ec";
        /// An entry that the guest has not used is mapped beforehand.
        PrefetchUnused = "commit_3ddf6c06e13e";
        /// A leaf of a shadow is changed into one of another page.
        ShadowChangesFrame = "cve_2026_23402.shadow";
        /// A huge page of a shadow is executable although that was forbidden.
        ShadowHugeExecutable = "cve_2018_12207.shadow";
        /// A write over two entries is taken for one to the first.
        StraddleIgnored = "misaligned_writes";
        /// A write to a part of an entry is not noticed.
        PartialIgnored = "misaligned_writes.partial";
        /// Shadows of nested tables rely on dirty bits for the log.
        NestedByDirtyBits = "clear_dirty_l2";
        /// A note about device memory is put over a leaf, and its record stays.
        ShadowNoteOverLeaf = "cve_2026_23401.shadow";
        /// Clearing CR4.PCIDE leaves what was cached.
        PcideKept = "pcide_toggle";
        /// INIT leaves the role as it was.
        InitKeepsRole = "commit_03a6e84069d1";
        /// Registers that are set from outside flush nothing.
        SetFromOutsideKeeps = "commit_4346db6e6e7a";
        /// A vCPU that was not running when the flush was requested does not flush.
        FlushOnlyRunning = "cve_2022_39189";
        /// A flush of the guest marks the current root only.
        FlushCurrentOnly = "stale_guest_flush";
        /// The pointers of a 32-bit L1 are kept although it has changed them.
        PointersOfPaeKept = "commit_ee6268ba3a68.pointers";
    }
    slips {
        /// A shadow permits writes to a page that is not dirty yet.
        ShadowWriteWithoutDirty = "shadow_write_without_dirty" by ["f4_a_clean_leaf_is_shadowed_read_only"];
        /// A walk sets accessed bits before it knows that the access is permitted.
        MarkFailedWalks = "mark_failed_walks" by ["a_fault_of_the_first_stage"];
        /// Any access makes a leaf dirty.
        DirtyOnReads = "dirty_on_reads" by ["f4_a_clean_leaf_is_shadowed_read_only"];
        /// A write makes links dirty, too.
        DirtyLinks = "dirty_links" by ["both_stages_translate_and_mark"];
        /// Accessed bits are set in leaves only.
        AccessedLeavesOnly = "accessed_leaves_only" by ["cve_2022_1158"];
        /// A walk goes on although the guest has changed an entry under it.
        GuestStoreIgnored = "guest_store_ignored" by ["f2_a_guest_store"];
        /// A page becomes dirty in L1's tables and is not in its log.
        NestedLogAfterDirty = "nested_log_skipped" by ["f5_the_page_modification_log"];
        /// A protection key forbids a supervisor's writes without CR0.WP.
        KeyIgnoresWp = "key_ignores_wp" by ["protection_keys"];
        /// A protection key forbids fetches.
        KeyForFetches = "key_for_fetches" by ["protection_keys"];
        /// A reserved memory type of EPT is no misconfiguration.
        EptTypeUnchecked = "ept_type_unchecked" by ["ept_exhaustive", "cve_2017_12188_every_bit_of_every_entry_of_ept"];
        /// Writes without reads are no misconfiguration.
        EptWriteOnly = "ept_write_only" by ["ept_exhaustive"];
        /// The high address bits of a 4 MiB page are lost.
        Pse36Ignored = "pse36_ignored" by ["two_levels_every_bit"];
        /// An address that nested tables do not reach is cut to what they do.
        WideNestedAddress = "wide_nested_address" by ["ept_addresses_beyond"];
        /// EPT entries are marked although the pointer turns the flags off.
        EptIgnoresFlagsOff = "ept_marks_unasked" by ["ept_accessed_and_dirty_flags"];
        /// Only the leaf's rights count.
        LeafRightsOnly = "leaf_rights_only" by ["four_levels_exhaustive"];
        /// The error code says that the access was a fetch although neither NX nor SMEP is on.
        FetchAlwaysReported = "fetch_always_reported" by ["golden_npf_exit_info_1"];
        /// Reading an entry through nested tables is no write.
        TablesReadForReading = "nested_tables_only_read" by ["g3_rights_of_the_leaves_of_tables", "nested_tables_are_read_as_user_accesses"];
        /// What both stages permit is what the second permits.
        SecondStageAlone = "second_stage_alone" by ["the_result_is_what_both_stages_agree_on"];
        /// A page of both stages is as large as that of the second.
        PageOfSecondStage = "page_of_second_stage" by ["the_result_is_what_both_stages_agree_on"];
        /// An access-tracked page is writable again when it is restored.
        OldKeepsW = "old_keeps_w" by ["b8_an_old_leaf_keeps"];
        /// Aging takes W, and nobody knows that a TLB may still have it.
        OldForgetsW = "old_forgets_w" by ["c2_protecting_an_old_page"];
        /// The small pages of a huge page are clean.
        SplitLosesDirty = "split_loses_dirty" by ["b7_split"];
        /// A huge page reaches into memory that is being taken away.
        HugeIntoInvalidation = "huge_into_invalidation" by ["e1_no_page_reaches"];
        /// The moment is noted after the backing was asked.
        SequenceAfterResolve = "sequence_after_resolve" by ["e1_the_moment"];
        /// A page of a read-only slot is mapped writable for a read.
        ReadOnlySlotWritable = "read_only_slot_writable" by ["every_outcome"];
        /// A tracked page is mapped writable for a read.
        TrackedWritable = "tracked_writable" by ["tracked_pages"];
        /// A read maps a page of a logged slot writable.
        LoggedReadWritable = "logged_read_writable" by ["h1_a_log_misses_no_write"];
        /// A read maps a page of a logged slot with D set.
        ResolvedDirty = "resolved_dirty" by ["h1_a_log_misses_no_write"];
        /// What was resolved before its backing changed is mapped.
        StaleInstalled = "stale_installed" by ["e1_a_resolution"];
        /// A fault puts a page into a table that was taken out of the tree.
        FrozenOverwritten = "frozen_overwritten" by ["e6_a_fault"];
        /// A write is noted before the page is mapped.
        NoteBeforeMapping = "note_before_mapping" by ["h1_a_harvest_during"];
        /// A write is noted before the page becomes writable.
        NoteBeforeRelaxing = "note_before_relaxing" by ["h1_a_harvest_during"];
        /// A lost race leaves entries in the pages of the cache.
        UnbuildForgotten = "unbuild_forgotten" by ["a_lost_race"];
        /// A block is mapped huge although its frames are not aligned.
        MisalignedHuge = "misaligned_huge" by ["a_block_that_is_less_aligned"];
        /// A leaf that disagrees with its slot is changed, not taken away.
        LeafChangesPage = "leaf_changes_page" by ["d8_a_leaf_that_disagrees"];
        /// A fast fault notes the write before the page becomes writable.
        FastNoteBefore = "fast_note_before" by ["h1_a_harvest_during"];
        /// A fast fault makes a page of a logged slot writable and does not say so.
        FastForgetsLog = "fast_forgets_log" by ["h1_the_fast_path_logs"];
        /// A huge page of a logged slot becomes writable.
        HugeLoggedWritable = "huge_logged_writable" by ["the_fast_path_leaves_huge"];
        /// A fast fault makes a tracked page writable.
        FastLiftsTracked = "fast_lifts_tracked" by ["tracked_pages"];
        /// Aging asks for a flush.
        AgingFlushes = "aging_flushes" by ["h5_aging"];
        /// Unprotecting makes tracked pages writable.
        UnprotectTracked = "unprotect_tracked" by ["tracked_pages"];
        /// Unprotecting makes pages of a logged slot writable.
        UnprotectLogged = "unprotect_logged" by ["any_sequence"];
        /// The D of a leaf that is zapped is lost.
        ZappedDirtyLost = "zapped_dirty_lost" by ["h1_what_a_zap_takes"];
        /// The D of leaves that go with their table is lost.
        RetiredDirtyLost = "retired_dirty_lost" by ["h1_what_a_zap_takes"];
        /// Recovery takes tables of logged slots away.
        RecoverLogged = "recover_logged" by ["recovery_spares"];
        /// A table that the range covers in part goes as a whole.
        ZapTooMuch = "zap_too_much" by ["zap_takes_what_it_covers"];
        /// A table that was taken out is left empty, not frozen.
        NotFrozen = "not_frozen" by ["e6_a_fault"];
        /// A note about device memory of another generation is honoured.
        OldNoteHonoured = "old_note_honoured" by ["i1_a_note_holds"];
        /// Generations wrap and old notes hold again.
        EpochIgnored = "epoch_ignored" by ["i1_a_wrap"];
        /// A huge page is writable though a page in it was watched.
        CollapseWatched = "collapse_watched" by ["b7_collapse_keeps"];
        /// What is split for its fetches is collapsed.
        CollapseSplit = "collapse_split" by ["cve_2018_12207", "recovery", "any_sequence"];
        /// A split that loses a race leaves entries in the page of the cache.
        SplitNotCleaned = "split_not_cleaned" by ["a_split_that_loses"];
        /// The small pages of a huge page that was not executable for its size are not, either.
        SplitKeepsNx = "split_keeps_nx" by ["a_split_of_a_page_that_must_not"];
        /// A fault maps into a root that is obsolete.
        ObsoleteRootLive = "obsolete_root_live" by ["d7_a_root_that_is_held"];
        /// A root is taken apart that somebody holds.
        HeldRootDropped = "held_root_dropped" by ["d7_a_root_that_is_held"];
        /// A root that nobody holds is still mapped into.
        PutRootStaysLive = "put_root_stays_live" by ["a_put_root_is_refused"];
        /// A root is shared by roles.
        RootOfOtherRole = "root_of_other_role" by ["every_role_has_its_root"];
        /// A joined obligation is forgotten.
        JoinForgets = "join_forgets" by ["joined_obligations"];
        /// An obligation that is dropped is forgotten.
        DropForgets = "drop_forgets" by ["a_dropped_flush_is_sticky"];
        /// A page is given back whoever may still reach it.
        ReclaimedAtOnce = "reclaimed_at_once" by ["c3_tables_come_back"];
        /// Recovery takes all split tables away at once.
        RecoverAll = "recover_all" by ["recovery_takes_a_share"];
        /// The second of two invalidations hides the first.
        InvalidationsApart = "invalidations_apart" by ["overlapping_invalidations"];
        /// What was resolved during an invalidation holds after it.
        InvalidationEndsQuietly = "invalidation_ends_quietly" by ["e1_a_resolution"];
        /// Nobody is kicked out of the guest.
        KickNobody = "kick_nobody" by ["c3_tables_come_back"];
        /// A walk under way holds no table back.
        WalksHoldNothing = "walks_hold_nothing" by ["a_walk_under_way"];
        /// An entry inside a walk acknowledges for the walk, too.
        AcknowledgesInWalk = "acknowledges_in_walk" by ["an_entry_inside_a_walk"];
        /// The exclusive guard does not wait for walks.
        ExclusiveBesideWalks = "exclusive_beside_walks" by ["the_exclusive_guard_excludes"];
        /// A page of a logged slot is mapped huge.
        HugeLogged = "huge_logged" by ["h4_a_logged_slot"];
        /// A block with a tracked page is mapped huge.
        HugeTracked = "huge_tracked" by ["d4_tracked_pages"];
        /// A page is tracked no more when the first of two gives it up.
        UntrackedByOne = "untracked_by_one" by ["0f38453cdb2e"];
        /// What the hypervisor writes to guest memory is not logged.
        EmulatedWriteUnlogged = "emulated_write_unlogged" by ["h1_writes_of_the_hypervisor"];
        /// A write goes to a read-only slot.
        ReadOnlySlotWritten = "read_only_slot_written" by ["a_copy_is_whole"];
        /// The log has bits of pages that the slot has not.
        LogBeyondSlot = "log_beyond_slot" by ["h1_all_set"];
        /// Clearing some pages of a log clears all of the word.
        ClearKeepsBits = "clear_all" by ["h1_all_set"];
        /// A tracked page is mapped writable beforehand.
        PrefetchTracked = "prefetch_tracked" by ["d6", "any_sequence"];
        /// A write by way of a shadow is not logged.
        ShadowWriteUnlogged = "shadow_write_unlogged" by ["h1_a_log_misses"];
        /// A page of a read-only slot is writable in a shadow.
        ShadowReadOnlyWritable = "shadow_read_only_writable" by ["any_sequence", "four_levels"];
        /// A page that a supervisor may write because CR0.WP is clear stays a page of the user.
        ShadowUserPageKept = "shadow_user_page_kept" by ["without_wp"];
        /// A write under suspended SMAP leaves a page that SMAP does not guard.
        SmapHole = "smap_hole" by ["a3_a_write_under_suspended_smap"];
        /// A table that is not of the lowest level is left unsync.
        UpperUnsync = "upper_unsync" by ["d5", "any_sequence"];
        /// The ancestors of an unsync page do not know.
        UnsyncParentsUnmarked = "unsync_parents_unmarked" by ["d5"];
        /// A sync leaves W to a leaf whose entry is clean now.
        SyncKeepsWrite = "sync_keeps_write" by ["f4_a_cleared_dirty_bit"];
        /// A sync does not compare frames.
        SyncOtherFrame = "sync_other_frame" by ["d5_unsync"];
        /// A sync keeps a leaf whose entry is not accessed any more.
        SyncUnused = "sync_unused" by ["f1_a_cleared_accessed_bit"];
        /// A sync does not go down.
        SyncThisPageOnly = "sync_this_page_only" by ["d5_unsync"];
        /// A table that is written again and again stays shadowed.
        FloodIgnored = "flood_ignored" by ["a_flood_of_writes"];
        /// A 4 MiB entry that is written loses one of the two entries of its shadow.
        OneOfTwoEntries = "one_of_two_entries" by ["two_levels"];
        /// Marks that are too many are forgotten.
        MarksForgotten = "marks_forgotten" by ["h1_marks_that_are_too_many"];
        /// A table is shadowed and not tracked.
        ShadowUntracked = "shadow_untracked" by ["d6", "four_levels"];
        /// A huge page stays although a table in it is shadowed.
        ShadowedHuge = "shadowed_huge" by ["d6", "d4"];
        /// A page of an obsolete generation is used again.
        ObsoleteReused = "obsolete_reused" by ["d7", "d10"];
        /// A page that this fault uses is recycled.
        RecycleInUse = "recycle_in_use" by ["d7_recycled"];
        /// A page goes and links to it stay.
        ZapLeavesParents = "zap_leaves_parents" by ["d7", "any_sequence"];
        /// A page with something unsync below is linked, and its ancestors do not know.
        LinkForgetsUnsync = "link_forgets_unsync" by ["d5", "any_sequence"];
        /// A read maps a page of a logged slot so that the first write goes unnoticed.
        ShadowUnarmed = "shadow_unarmed" by ["h1_a_log_misses"];
        /// A leaf of a shadow goes and its D with it.
        ShadowDirtyLost = "shadow_dirty_lost" by ["h1_a_leaf_that_goes"];
        /// A note in a shadow holds beyond its generation.
        ShadowOldNote = "shadow_old_note" by ["i2_a_note_ends"];
        /// Generations wrap and old notes of a shadow hold again.
        ShadowEpochIgnored = "shadow_epoch_ignored" by ["i1_notes_do_not_survive"];
        /// A note answers a write that the guest's tables forbid.
        ShadowNoteForWrites = "shadow_note_for_writes" by ["i1_a_note_answers"];
        /// Collapsing drops small pages that are needed.
        ShadowCollapseLogged = "shadow_collapse_needed" by ["collapse_drops", "logging_ends"];
        /// Recovery takes pages of logged slots away.
        ShadowRecoverLogged = "shadow_recover_logged" by ["b6_recovery_spares"];
        /// A vCPU that moves to another CPU trusts the tag there.
        TagOfOtherCpu = "tag_of_other_cpu" by ["c4_the_tag"];
        /// A vCPU enters on an obsolete root.
        ObsoleteEntered = "obsolete_entered" by ["d7"];
        /// An address that is due hides a flush of everything.
        DueAddressOnly = "due_address_only" by ["any_sequence", "vcpu"];
        /// A vCPU runs on a root that is behind.
        BehindRootRuns = "behind_root_runs" by ["any_sequence", "stale_guest_flush"];
        /// The root that was used last goes first.
        LeastRecentKept = "least_recent_kept" by ["d9_the_least_recently"];
        /// The second address that is due hides the first.
        OneSyncOfTwo = "one_sync_of_two" by ["c5_two_invalidated_addresses"];
        /// A root that is behind is run on as it is.
        RootUnsynced = "root_unsynced" by ["stale_guest_flush", "any_sequence"];
        /// An address that was invalidated is not synced.
        AddressUnsynced = "address_unsynced" by ["any_sequence"];
        /// The memory type of L1's entry is ignored.
        NestedTypeIgnored = "nested_type_ignored" by ["memory_type", "caching"];
        /// Fetches by user and supervisor of L2 are not told apart.
        UserFetchesAlike = "user_fetches_alike" by ["mode_based", "g1"];
        /// A clean entry is mapped writable beforehand.
        PrefetchClean = "prefetch_clean" by ["an_emulated_write_maps"];
        /// A root of PAE is found whatever its pointers are.
        PointersIgnored = "pae_pointers_ignored" by ["any_sequence_with_pae"];
        /// An exit of L2 is always about the final address.
        ExitAlwaysFinal = "exit_always_final" by ["cve_2026_46032_a_root_outside"];
        /// What was known of a lowest table is used after a link above it went.
        NearUnlinked = "near_unlinked" by ["shadow", "any_history"];
        /// A near fault makes a tracked page writable.
        NearTracked = "near_tracked" by ["shadow", "any_history"];
        /// A near fault makes a page of a read-only slot writable.
        NearReadOnly = "near_read_only" by ["shadow", "any_history"];
        /// A near fault makes a clean page writable.
        NearClean = "near_clean" by ["shadow", "any_history"];
        /// An entry that the guest has not used is mapped when it is flushed.
        RenewUnused = "renew_unused" by ["shadow", "any_history"];
        /// A leaf whose entry has changed counts as up to date.
        SeenChanged = "seen_changed" by ["shadow", "sync", "vcpu"];
        /// The vCPU goes back to a root that is behind.
        SeenBehind = "seen_behind" by ["c5_mov_to_cr3", "vcpu", "shadow"];
        /// The vCPU goes back to a root for another CR3.
        SeenOtherTable = "seen_other_table" by ["c5_mov_to_cr3", "vcpu", "shadow"];
        /// The vCPU goes back to a root for other control bits.
        SeenOtherMode = "seen_other_mode" by ["c5_mov_to_cr0", "vcpu", "shadow"];
        /// Of an entry that was changed, W alone is looked at.
        DifferByMore = "differ_by_more" by ["shadow", "sync", "vcpu"];
        /// A leaf for the supervisor stays when the guest's page becomes a user's.
        SyncKeepsSupervisor = "sync_keeps_supervisor" by ["a_page_that_becomes", "shadow"];
        /// What a guest's flush took away is not flushed from other TLBs when the host relies on that.
        OwedForgotten = "owed_forgotten" by ["shadow", "vcpu"];
        /// A fault with CR0.WP clear leaves the vCPU on the root for WP set.
        UnprotectedFaultKept = "unprotected_fault_kept" by ["cr0_wp", "vcpu", "shadow"];
        /// The vCPU stays on the root for CR0.WP clear when WP is set.
        UnprotectedRootKept = "unprotected_root_kept" by ["cr0_wp", "vcpu", "shadow"];
    }
}
