//! `docs/support.md` against live controllers.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::ctrl::aer::KINDS;
use crate::spec::NvmOpcode;
use crate::subsys::Limits;
use crate::subsys::tests::build;
use crate::xfer::Transport;

const DOCUMENT: &str = include_str!("../../../../docs/support.md");

const SUPPORTED: &str = "supported";

/// The cells of the table's rows under a heading.
fn rows(heading: &str) -> Vec<Vec<&'static str>> {
    let mut lines = DOCUMENT.lines().skip_while(|line| *line != format!("## {heading}"));
    assert!(lines.next().is_some(), "no heading {heading}");
    let lines = lines.take_while(|line| !line.starts_with("## "));
    let cells = |line: &'static str| {
        let inner = line.trim_start_matches("| ").trim_end_matches('|');
        inner.split('|').map(str::trim).collect()
    };
    // The first two are the head and the rule under it.
    let rows: Vec<Vec<_>> = lines.filter(|line| line.starts_with('|')).skip(2).map(cells).collect();
    assert!(!rows.is_empty(), "no table under {heading}");
    rows
}

fn hex(text: &str) -> u32 {
    u32::from_str_radix(text.strip_suffix('h').unwrap(), 16).unwrap()
}

/// The answers (from the third cell on) to every code in `0..end`, each from exactly one row.
fn answers(
    heading: &str,
    columns: usize,
    end: u32,
    step: usize,
) -> BTreeMap<u32, Vec<&'static str>> {
    let mut table = BTreeMap::new();
    for row in rows(heading) {
        let (from, to) = row[0].split_once('–').unwrap_or((row[0], row[0]));
        for code in (hex(from)..=hex(to)).step_by(step) {
            let before = table.insert(code, row[2..2 + columns].to_vec());
            assert_eq!(before, None, "{heading}: {code:x}h twice");
        }
        assert!(row[2 + columns].starts_with('`'), "{heading}: {} has no test", row[0]);
    }
    let codes: Vec<u32> = table.keys().copied().collect();
    assert!(codes.iter().copied().eq((0..end).step_by(step)), "{heading}: a code has no row");
    table
}

/// How the document says it.
fn describe(result: Result<u64, Status>) -> String {
    match result {
        Ok(_) => SUPPORTED.to_owned(),
        Err(status) => {
            assert!(status.is_dnr(), "{status}: a host is not to try again");
            let name = status.name().expect("a known status");
            let words = name.split('_').map(|word| match word {
                "IN" | "OR" => word.to_lowercase(),
                _ => {
                    let (first, rest) = word.split_at(1);
                    first.to_owned() + &rest.to_lowercase()
                }
            });
            format!("refused: {}", words.collect::<Vec<_>>().join(" "))
        }
    }
}

#[track_caller]
fn agree(heading: &str, code: u32, said: &str, result: Result<u64, Status>) {
    assert_eq!(said, describe(result), "{heading} {code:x}h");
}

/// A controller that has everything that the target has to offer, and one for discovery.
fn rigs() -> [Rig; 2] {
    let mut io = Rig::of(shared());
    io.ctrl.set_instance(Instance { ciu: 1, cirn: 2 });
    [io, Rig::discovery()]
}

#[test]
fn support_table_is_what_controllers_do() {
    for (code, said) in answers("Admin commands", 2, 256, 1) {
        for (mut rig, said) in rigs().into_iter().zip(said) {
            agree("admin command", code, said, rig.run(admin_command(code as u8)));
        }
    }
    for (code, said) in answers("Identify", 2, 256, 1) {
        for (mut rig, said) in rigs().into_iter().zip(said) {
            let mut sqe = Sqe::new(AdminOpcode::IDENTIFY.0);
            sqe.nsid.set(1);
            // CNTID FFFFh: this controller.
            sqe.cdw10.set(code | 0xffff << 16);
            sqe.dptr = SglDescriptor::transport(4096);
            agree("CNS", code, said, rig.run(sqe));
        }
    }
    for (code, said) in answers("Log pages", 2, 256, 1) {
        for (mut rig, said) in rigs().into_iter().zip(said) {
            let get = GetLogPage { lsi: 1, ..read(LogPage(code as u8), 512) };
            agree("log page", code, said, rig.log_page(get, NSID_ALL).map(|_| 0));
        }
    }
}

/// A command with this opcode that is all right, if there is one.
fn admin_command(opcode: u8) -> Sqe {
    let mut sqe = Sqe::new(opcode);
    match AdminOpcode(opcode) {
        AdminOpcode::IDENTIFY => {
            sqe.cdw10.set(1);
            sqe.dptr = SglDescriptor::transport(4096);
        }
        AdminOpcode::GET_LOG_PAGE => {
            read(LogPage::SUPPORTED_LOG_PAGES, 1024).apply(&mut sqe);
            sqe.dptr = SglDescriptor::transport(1024);
        }
        AdminOpcode::SET_FEATURES | AdminOpcode::GET_FEATURES => {
            sqe.cdw10.set(u32::from(Feature::KEEP_ALIVE_TIMER.0));
        }
        AdminOpcode::FABRICS => {
            sqe = Sqe::fabrics(FabricsType::PROPERTY_GET);
            sqe.cdw11.set(Property::VS.0);
        }
        _ => {}
    }
    sqe
}

#[test]
fn support_table_of_io_commands() {
    let subsys = rigs()[0].ctrl.subsys().clone();
    for (code, said) in answers("I/O commands", 1, 256, 1) {
        let mut sqe = Sqe::new(code as u8);
        sqe.nsid.set(1);
        let result = if sqe.is_fabrics() {
            let disconnect = Sqe::fabrics(FabricsType::DISCONNECT);
            io_queue_fabrics(&disconnect)
        } else {
            io_command(&mut sqe);
            io::decode(&sqe, &subsys).map(drop)
        };
        agree("I/O command", code, said[0], result.map(|()| 0));
    }
}

/// Fills in what a command with this opcode needs to be all right.
fn io_command(sqe: &mut Sqe) {
    let len = match NvmOpcode(sqe.opcode) {
        NvmOpcode::READ | NvmOpcode::WRITE | NvmOpcode::COMPARE => 512,
        NvmOpcode::DATASET_MANAGEMENT
        | NvmOpcode::RESERVATION_REGISTER
        | NvmOpcode::RESERVATION_ACQUIRE => 16,
        NvmOpcode::RESERVATION_RELEASE => 8,
        NvmOpcode::RESERVATION_REPORT => {
            // 64 bytes, extended.
            sqe.cdw10.set(15);
            sqe.cdw11.set(1);
            64
        }
        NvmOpcode::COPY => 32,
        _ => 0,
    };
    if NvmOpcode(sqe.opcode) == NvmOpcode::RESERVATION_ACQUIRE {
        sqe.cdw10.set(1 << 8);
    }
    sqe.dptr = SglDescriptor::transport(len);
}

#[test]
fn support_table_of_fabrics_commands() {
    for (code, said) in answers("Fabrics commands", 2, 256, 1) {
        let fctype = FabricsType(code as u8);
        let mut sqe = Sqe::fabrics(fctype);
        if matches!(fctype, FabricsType::PROPERTY_GET | FabricsType::PROPERTY_SET) {
            sqe.cdw11.set(Property::CSTS.0);
        }
        for mut rig in rigs() {
            if fctype == FabricsType::CONNECT {
                rig.data = vec![0; 1024];
            }
            agree("FCTYPE", code, said[0], rig.run(sqe));
        }
        agree("FCTYPE", code, said[1], io_queue_fabrics(&sqe).map(|()| 0));
    }
}

#[test]
fn support_table_of_features() {
    for (code, said) in answers("Features", 4, 256, 1) {
        let fid = Feature(code as u8);
        let nsid = if (0x82..=0x84).contains(&code) { 1 } else { 0 };
        for (mut rig, said) in rigs().into_iter().zip(said.chunks(2)) {
            for select in 0..4 {
                let mut get = Sqe::new(AdminOpcode::GET_FEATURES.0);
                get.nsid.set(nsid);
                get.cdw10.set(code | select << 8);
                // EXHID: the Host Identifier of 128 bits.
                get.cdw11.set(u32::from(fid == Feature::HOST_IDENTIFIER));
                get.dptr = SglDescriptor::transport(4096);
                agree("get feature", code, said[0], rig.run(get));
            }
            rig.data = vec![0; 512];
            agree("set feature", code, said[1], rig.set_feature_of(nsid, fid, 0));
        }
    }
}

#[test]
fn support_table_of_properties() {
    for (offset, said) in answers("Properties", 4, 0x1000, 4) {
        let has_8_bytes = Property(offset) == Property::CAP;
        for size in [0, 1] {
            let is_right_size = (size == 1) == has_8_bytes;
            for (mut rig, said) in rigs().into_iter().zip(said.chunks(2)) {
                let mut get = Sqe::fabrics(FabricsType::PROPERTY_GET);
                get.cdw10.set(size);
                get.cdw11.set(offset);
                let mut set = Sqe { ..get };
                set.nsid.set(u32::from(FabricsType::PROPERTY_SET.0));
                set.cdw12.set(Cc::ENABLE.0);
                for (sqe, said) in [(get, said[0]), (set, said[1])] {
                    let said =
                        if is_right_size { said } else { "refused: Invalid Field in Command" };
                    agree("property", offset, said, rig.run(sqe));
                }
            }
        }
    }
}

/// A PCI function's controller over the same namespaces.
fn pcie() -> Rig {
    let subsys = shared();
    let limits = Limits { transport: Transport::Pcie, ..*subsys.limits() };
    let groups = subsys.ana_groups().to_vec();
    let subsys = build(subsys.namespaces().to_vec(), limits).unwrap();
    let mut rig = Rig::new(ControllerKind::Io, subsys.with_ana_groups(groups).unwrap());
    let _ = rig.ctrl.register_write(Property::AQA.0, 0x001f_001f);
    let _ = rig.ctrl.register_write(Property::CC.0, Cc::ENABLE.0);
    assert!(rig.ctrl.is_ready());
    rig
}

/// What both kinds of controller answer, for every code.
#[test]
fn support_table_of_pcie_controllers() {
    let mut said = BTreeMap::new();
    for row in rows("PCIe controllers") {
        assert!(row[4].starts_with('`'), "{row:?} has no test");
        assert_eq!(said.insert((row[0], hex(row[1])), row[3]), None, "{row:?} twice");
    }
    let mut compare = |kind: &'static str, code: u32, io: &str, sqe: Sqe| {
        let said = said.remove(&(kind, code)).unwrap_or(io);
        let mut sqe = Sqe { flags: 0, ..sqe };
        sqe.set_prps(0x1000, 0);
        let mut rig = pcie();
        rig.data = vec![0; 512];
        agree(kind, code, said, rig.run(sqe));
    };
    for (code, said) in answers("Admin commands", 2, 256, 1) {
        let mut sqe = admin_command(code as u8);
        match AdminOpcode(sqe.opcode) {
            // One that both have.
            AdminOpcode::SET_FEATURES | AdminOpcode::GET_FEATURES => {
                sqe.cdw10.set(u32::from(Feature::ARBITRATION.0));
            }
            AdminOpcode::CREATE_IO_CQ => sqe.cdw10.set(1 << 16 | 1),
            // For the others to succeed a queue has to be there.
            AdminOpcode::CREATE_IO_SQ | AdminOpcode::DELETE_IO_CQ | AdminOpcode::DELETE_IO_SQ => {
                let mut rig = pcie();
                let status = rig.run(Sqe { flags: 0, ..sqe }).unwrap_err();
                assert_eq!(status, Status::INVALID_QUEUE_IDENTIFIER.dnr(), "{code:x}h");
                assert_eq!(said[0], "refused: Invalid Command Opcode");
                continue;
            }
            _ => {}
        }
        compare("admin command", code, said[0], sqe);
    }
    for (code, said) in answers("Features", 4, 256, 1) {
        let nsid = if (0x82..=0x84).contains(&code) { 1 } else { 0 };
        for (kind, opcode, said) in [
            ("get feature", AdminOpcode::GET_FEATURES, said[0]),
            ("set feature", AdminOpcode::SET_FEATURES, said[1]),
        ] {
            let mut sqe = Sqe::new(opcode.0);
            sqe.nsid.set(nsid);
            sqe.cdw10.set(code);
            let fid = Feature(code as u8);
            sqe.cdw11.set(u32::from(fid == Feature::HOST_IDENTIFIER));
            compare(kind, code, said, sqe);
        }
    }
    for code in [0x00, 0x01, 0x04] {
        assert_eq!(said.remove(&("admin command", code)), Some(SUPPORTED));
    }
    assert!(said.is_empty(), "rows that were not looked at: {said:?}");
}

#[test]
fn support_table_of_events() {
    let said: BTreeSet<_> = rows("Asynchronous events")
        .iter()
        .map(|row| (hex(row[0]), hex(row[1]), hex(row[2])))
        .collect();
    let events = KINDS.map(|kind| {
        let (event_type, info) = kind.code();
        (event_type, info, u32::from(kind.log_page().0))
    });
    assert_eq!(said, BTreeSet::from(events));
}

/// Whether what is sent is sent is for `cargo xtask check` to see, which has all sources.
#[test]
fn support_table_of_status_codes() {
    let mut named = BTreeMap::new();
    for row in rows("Status codes") {
        let code = (hex(row[0]) << 8 | hex(row[1])) as u16;
        named.entry(code).or_insert_with(Vec::new).push(row[2]);
        assert!(matches!(row[3], "sent" | "not sent"), "{row:?}");
    }
    for code in 0..0x800 {
        let names = named.remove(&code).unwrap_or_default();
        match Status(code).name() {
            Some(name) => assert!(names.contains(&name), "{code:x}: {names:?}"),
            None => assert!(names.is_empty(), "{code:x}: {names:?}"),
        }
    }
}
