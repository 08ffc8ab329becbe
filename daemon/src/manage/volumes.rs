//! Changes of volumes and their namespaces.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use api::{Code, Done, Problem};
use block::{Volume, VolumeSpec};
use nvmf_target::{ChangeError, NamespaceConfig};

use super::plan::VolumeRecord;
use super::{
    Entry, Gate, Manager, Subnqn, VOLUMES_MAX, chain, check_group, draining, failed, lock, problem,
    refused, shown,
};
use crate::config::{hosts_of, is_name};
use crate::flush;
use crate::state::{Change, Hosts, Stored};

/// A volume of the book, and the NQN of its subsystem.
type Found<V> = (VolumeRecord, V, Subnqn);

impl Manager {
    /// Serves a volume.
    pub(crate) fn attach(&self, gate: &Gate, request: &api::AttachVolume) -> Result<Done, Problem> {
        let _changing = lock(&self.changing);
        let record = self.record_of(request)?;
        let name = record.name.clone();
        let spec_text = record.spec.to_string();
        let subsystem = record.subsystem.clone();
        let nqn = self.book().nqn_of(&subsystem)?;

        // The identity is durable before a host can see the disk.
        let (before, nsid, identity) = {
            let mut book = self.book();
            let before = book.state.stored().clone();
            let minted = book.state.volume_in(&subsystem, &name, request.nsid, &[]);
            let (nsid, identity) = minted.map_err(|taken| {
                problem(
                    Code::Conflict,
                    taken.to_string(),
                    "another namespace ID, or leave nsid out",
                )
            })?;
            (before, nsid, identity)
        };
        if u64::from(nsid) > u64::from(self.limits.namespaces_max) {
            self.take_back(before);
            return Err(problem(
                Code::Conflict,
                format!("namespace ID {nsid} is above limits.namespaces_max"),
                format!("1 to {}", self.limits.namespaces_max),
            ));
        }
        let record = VolumeRecord { nsid, identity, ..record };
        let kept = self.keep(|stored| {
            let Some(volume) = stored.volumes.iter_mut().find(|v| v.name == name) else { return };
            volume.attached = record.runtime.then_some(spec_text);
            volume.detached = None;
            volume.write_protect = record.write_protect;
            Change::set(&mut volume.ana_group, record.ana_group, &record.configured_group);
            Change::set(
                &mut volume.hosts,
                Hosts::of(record.hosts.as_deref()),
                &Hosts::of(record.configured_hosts.as_deref()),
            );
        });
        if let Err(error) = kept {
            self.take_back(before);
            return Err(error);
        }

        let opened = match record.spec.open(identity) {
            Ok(opened) => opened,
            Err(error) => {
                self.take_back(before);
                return Err(problem(
                    Code::Failed,
                    format!("opening volume {name:?}: {}", chain(&error)),
                    "",
                ));
            }
        };
        let notices = opened.notices();
        let namespace = NamespaceConfig {
            nsid,
            volume: opened.clone(),
            ana_group: record.ana_group,
            hosts: record.hosts.clone(),
        };
        gate.in_force.store(true, Ordering::Release);
        let result = self.target.attach(&nqn, namespace);
        let late = match result {
            Ok(()) => None,
            Err(ChangeError::StillDraining { waited }) => Some(waited),
            Err(error) => {
                gate.in_force.store(false, Ordering::Release);
                self.take_back(before);
                return Err(self.target_refused(error));
            }
        };
        if record.write_protect
            && let Err(error) = self.target.set_write_protect(&nqn, nsid, true)
        {
            tracing::error!(volume = %name, %error, "cannot protect against writes");
        }
        tracing::info!(volume = %name, spec = %record.spec, nsid, %subsystem, "volume attached");
        let mut book = self.book();
        book.volumes.retain(|entry| entry.record.name != name);
        book.volumes.push(Entry { record, volume: Some(opened) });
        drop(book);
        match late {
            Some(waited) => Err(draining(waited)),
            None => self.done_volume(&name, notices),
        }
    }

    /// The record that a request to attach asks for, with a namespace ID and identity to come.
    fn record_of(&self, request: &api::AttachVolume) -> Result<VolumeRecord, Problem> {
        let name = &request.name;
        if !is_name(name) {
            return Err(problem(
                Code::Invalid,
                format!("name {name:?} is no name"),
                "1 to 64 of A-Z a-z 0-9 . _ -, not beginning with a dot or a dash",
            ));
        }
        let spec = request.spec.as_deref().map(str::parse::<VolumeSpec>).transpose();
        let spec = spec.map_err(|error| problem(Code::Invalid, format!("spec: {error}"), ""))?;
        let hosts = hosts_of(request.hosts.as_deref()).map_err(refused)?;
        if let Some(group) = request.ana_group {
            check_group(group)?;
        }
        if request.nsid.is_some_and(|nsid| nsid == 0 || nsid > self.limits.namespaces_max) {
            return Err(problem(
                Code::Invalid,
                format!("nsid {}", request.nsid.unwrap_or_default()),
                format!("a whole number from 1 to {}", self.limits.namespaces_max),
            ));
        }
        let book = self.book();
        let subsystem = request.subsystem.as_deref();
        if let Ok(entry) = book.entry(name) {
            let old = &entry.record;
            if entry.volume.is_some() {
                return Err(problem(
                    Code::Conflict,
                    format!("volume {name:?} is attached already"),
                    "another name, or detach it first",
                ));
            }
            if let Some(spec) = spec
                && spec != old.spec
            {
                let source =
                    if old.runtime { "it was attached as" } else { "the configuration says" };
                return Err(problem(
                    Code::Conflict,
                    format!("volume {name:?} is another disk: {source} {}", old.spec),
                    "leave spec out, or choose another name",
                ));
            }
            if let Some(subsystem) = subsystem
                && book.subsystem(subsystem)?.name != old.subsystem
            {
                return Err(problem(
                    Code::Conflict,
                    format!("volume {name:?} belongs to subsystem {:?}", old.subsystem),
                    "leave subsystem out, or choose another name",
                ));
            }
            return Ok(VolumeRecord {
                ana_group: request.ana_group.unwrap_or(old.ana_group),
                hosts: if request.hosts.is_some() { hosts } else { old.hosts.clone() },
                wanted: true,
                ..old.clone()
            });
        }
        let Some(spec) = spec else {
            return Err(problem(
                Code::Invalid,
                format!("volume {name:?} has no spec and is not in the configuration"),
                "spec: file:PATH[,size=SIZE], blockdev:PATH, ram:SIZE or null:SIZE",
            ));
        };
        if book.volumes.len() >= VOLUMES_MAX {
            return Err(problem(
                Code::Conflict,
                format!("there are {VOLUMES_MAX} volumes"),
                "no more than that",
            ));
        }
        let subsystem = match subsystem {
            Some(subsystem) => book.subsystem(subsystem)?.name.clone(),
            None => book.subsystem(crate::config::DEFAULT_SUBSYSTEM)?.name.clone(),
        };
        Ok(VolumeRecord {
            name: name.clone(),
            spec,
            subsystem,
            nsid: 0,
            identity: block::Identity::from_uuid([0; 16]),
            runtime: true,
            wanted: true,
            ana_group: request.ana_group.unwrap_or(1),
            configured_group: 1,
            hosts,
            configured_hosts: None,
            write_protect: false,
        })
    }

    /// Takes a volume away. Its identity is kept for the day it comes back.
    pub(crate) fn detach(&self, gate: &Gate, name: &str) -> Result<Done, Problem> {
        let _changing = lock(&self.changing);
        let (record, volume, nqn) = self.attached_or_not(name)?;
        if volume.is_none() && !record.runtime {
            return Err(problem(
                Code::Conflict,
                format!("volume {name:?} is detached already"),
                "",
            ));
        }
        let spec = record.spec.to_string();
        let change = |stored: &mut Stored| {
            let Some(kept) = stored.volumes.iter_mut().find(|v| v.name == name) else { return };
            kept.attached = None;
            if record.runtime {
                (kept.write_protect, kept.ana_group, kept.hosts) = (false, None, None);
            } else {
                kept.detached = Some(spec);
            }
        };
        let is_served = volume.is_some();
        self.commit(
            gate,
            change,
            |target| if is_served { target.detach(&nqn, record.nsid) } else { Ok(()) },
            |book| {
                if record.runtime {
                    book.volumes.retain(|entry| entry.record.name != name);
                } else if let Some(entry) = book.volumes.iter_mut().find(|e| e.record.name == name)
                {
                    entry.volume = None;
                    entry.record.wanted = false;
                }
            },
        )?;
        tracing::info!(volume = %name, "volume detached");
        let mut notices = Vec::new();
        if let Some(volume) = volume
            && let Err(error) = flush::flush_all(&[(name.to_owned(), volume)])
        {
            notices.push(format!("what hosts wrote last may not be durable: {error:#}"));
        }
        Ok(Done { kept: self.is_kept(), notices, ..Done::default() })
    }

    /// Looks at the backing object again; grows a file first, if `size` is given.
    pub(crate) fn resize(
        &self,
        gate: &Gate,
        name: &str,
        request: &api::ResizeVolume,
    ) -> Result<Done, Problem> {
        let _changing = lock(&self.changing);
        let (record, volume, nqn) = self.attached(name)?;
        if let Some(bytes) = request.size_bytes {
            let Some(path) = record.spec.path().filter(|_| is_file(&record.spec)) else {
                return Err(problem(
                    Code::Invalid,
                    format!("volume {name:?} is {}, which is not grown here", record.spec),
                    "size_bytes for file: volumes only; grow a device with its own tools and \
                     leave size_bytes out",
                ));
            };
            let geometry = volume.geometry();
            let (now, block) = (geometry.bytes(), u64::from(geometry.block_bytes));
            if bytes < now || !bytes.is_multiple_of(block) || bytes > i64::MAX as u64 {
                return Err(problem(
                    Code::Invalid,
                    format!("size_bytes {bytes}: volume {name:?} has {now} bytes"),
                    format!("a multiple of {block} from {now}: volumes do not shrink"),
                ));
            }
            grow(path, bytes).map_err(|error| {
                failed(format_args!("growing {} to {bytes} bytes: {error}", path.display()))
            })?;
        }
        gate.in_force.store(true, Ordering::Release);
        self.target.refresh(&nqn, record.nsid).map_err(|error| self.target_refused(error))?;
        let size_bytes = volume.geometry().bytes();
        tracing::info!(volume = %name, size_bytes, "volume looked at again");
        self.done_volume(name, Vec::new())
    }

    /// Sets which hosts see a volume.
    pub(crate) fn set_volume_hosts(
        &self,
        gate: &Gate,
        name: &str,
        request: &api::SetHosts,
    ) -> Result<Done, Problem> {
        let hosts = hosts_of(request.hosts.as_deref()).map_err(refused)?;
        let _changing = lock(&self.changing);
        let (record, volume, nqn) = self.attached_or_not(name)?;
        let (to, from) = (&hosts, &record.configured_hosts);
        self.commit(
            gate,
            |stored| {
                if let Some(kept) = stored.volumes.iter_mut().find(|v| v.name == name) {
                    let from = Hosts::of(from.as_deref());
                    Change::set(&mut kept.hosts, Hosts::of(to.as_deref()), &from);
                }
            },
            |target| match volume {
                Some(_) => target.set_namespace_hosts(&nqn, record.nsid, to.clone()),
                None => Ok(()),
            },
            |book| {
                if let Some(entry) = book.volumes.iter_mut().find(|e| e.record.name == name) {
                    entry.record.hosts = to.clone();
                }
            },
        )?;
        tracing::info!(volume = %name, hosts = %shown(&hosts), "hosts of the volume set");
        self.done_volume(name, Vec::new())
    }

    /// Moves a volume to another ANA group.
    pub(crate) fn move_volume(
        &self,
        gate: &Gate,
        name: &str,
        request: &api::MoveVolume,
    ) -> Result<Done, Problem> {
        let group = request.ana_group;
        check_group(group)?;
        let _changing = lock(&self.changing);
        let (record, volume, nqn) = self.attached_or_not(name)?;
        self.commit(
            gate,
            |stored| {
                if let Some(kept) = stored.volumes.iter_mut().find(|v| v.name == name) {
                    Change::set(&mut kept.ana_group, group, &record.configured_group);
                }
            },
            |target| match volume {
                Some(_) => target.move_namespace(&nqn, record.nsid, group),
                None => Ok(()),
            },
            |book| {
                if let Some(entry) = book.volumes.iter_mut().find(|e| e.record.name == name) {
                    entry.record.ana_group = group;
                }
            },
        )?;
        tracing::info!(volume = %name, group, "volume moved to another ANA group");
        self.done_volume(name, Vec::new())
    }

    /// Refuses writes to a volume, or takes them again.
    pub(crate) fn set_write_protect(
        &self,
        gate: &Gate,
        name: &str,
        request: &api::SetWriteProtect,
    ) -> Result<Done, Problem> {
        let _changing = lock(&self.changing);
        let (record, volume, nqn) = self.attached_or_not(name)?;
        let protect = request.enabled;
        self.commit(
            gate,
            |stored| {
                if let Some(kept) = stored.volumes.iter_mut().find(|v| v.name == name) {
                    kept.write_protect = protect;
                }
            },
            |target| match volume {
                Some(_) => target.set_write_protect(&nqn, record.nsid, protect),
                None => Ok(()),
            },
            |book| {
                if let Some(entry) = book.volumes.iter_mut().find(|e| e.record.name == name) {
                    entry.record.write_protect = protect;
                }
            },
        )?;
        tracing::info!(volume = %name, protect, "write protection set");
        self.done_volume(name, Vec::new())
    }

    /// Looks whether backing objects have grown: all of them, or those whose size has changed since
    /// `sizes` was taken. Not while a change is under way.
    pub(crate) fn refresh_grown(&self, sizes: &mut Vec<(String, u64)>, all: bool) {
        let Ok(_changing) = self.changing.try_lock() else { return };
        let entries: Vec<_> = {
            let book = self.book();
            let entries = book.volumes.iter().filter(|entry| entry.record.spec.is_persistent());
            entries
                .filter_map(|entry| Some((entry.record.clone(), entry.volume.clone()?)))
                .filter_map(|(record, volume)| {
                    let nqn = book.nqn_of(&record.subsystem).ok()?;
                    Some((record, volume, nqn))
                })
                .collect()
        };
        sizes.retain(|(name, _)| entries.iter().any(|(record, ..)| record.name == *name));
        for (record, volume, nqn) in entries {
            let Some(size) = record.spec.path().and_then(backing_bytes) else { continue };
            let block = u64::from(volume.geometry().block_bytes.max(1));
            let before = volume.geometry().bytes();
            let seen = sizes.iter_mut().find(|(name, _)| *name == record.name);
            let is_new = match seen {
                Some((_, seen)) => std::mem::replace(seen, size) != size,
                None => {
                    sizes.push((record.name.clone(), size));
                    true
                }
            };
            // A size that was looked at once, and refused, is not looked at again.
            if !all && (!is_new || size / block * block == before) {
                continue;
            }
            match self.target.refresh(&nqn, record.nsid) {
                Ok(()) => {
                    let size_bytes = volume.geometry().bytes();
                    if size_bytes != before {
                        tracing::info!(
                            volume = %record.name, before, size_bytes,
                            "the backing object has another size, hosts are told"
                        );
                    }
                }
                Err(error) => {
                    let error = chain(&error);
                    tracing::warn!(volume = %record.name, %error, "cannot look at the volume again");
                }
            }
        }
    }

    /// Keeps what hosts have set: write protection.
    pub(crate) fn keep_what_hosts_set(&self) {
        let Ok(_changing) = self.changing.try_lock() else { return };
        let status = self.target.status();
        let mut book = self.book();
        let mut changed = Vec::new();
        for entry in book.volumes.iter().filter(|entry| entry.volume.is_some()) {
            let Ok(nqn) = book.nqn_of(&entry.record.subsystem) else { continue };
            let namespace = status
                .subsystems
                .iter()
                .filter(|subsystem| subsystem.nqn == nqn)
                .flat_map(|subsystem| &subsystem.namespaces)
                .find(|namespace| namespace.nsid == entry.record.nsid);
            if let Some(namespace) = namespace
                && namespace.write_protect != entry.record.write_protect
            {
                changed.push((entry.record.name.clone(), namespace.write_protect));
            }
        }
        for (name, protect) in changed {
            if let Some(entry) = book.volumes.iter_mut().find(|e| e.record.name == name) {
                entry.record.write_protect = protect;
            }
            let stored = book.state.stored_mut().volumes.iter_mut().find(|v| v.name == name);
            if let Some(stored) = stored {
                stored.write_protect = protect;
            }
            tracing::info!(volume = %name, protect, "a host has set write protection");
        }
        if let Err(error) = book.state.save() {
            tracing::error!(error = %chain(&error), "cannot keep what a host has set");
        }
    }

    fn attached_or_not(&self, name: &str) -> Result<Found<Option<Arc<dyn Volume>>>, Problem> {
        let book = self.book();
        let entry = book.entry(name)?;
        let nqn = book.nqn_of(&entry.record.subsystem)?;
        Ok((entry.record.clone(), entry.volume.clone(), nqn))
    }

    fn attached(&self, name: &str) -> Result<Found<Arc<dyn Volume>>, Problem> {
        match self.attached_or_not(name)? {
            (record, Some(volume), nqn) => Ok((record, volume, nqn)),
            _ => Err(problem(
                Code::Conflict,
                format!("volume {name:?} is detached"),
                "attach it first",
            )),
        }
    }

    fn done_volume(&self, name: &str, notices: Vec<String>) -> Result<Done, Problem> {
        let volume = Some(self.volume(name)?);
        Ok(Done { kept: self.is_kept(), notices, volume, ..Done::default() })
    }
}

fn is_file(spec: &VolumeSpec) -> bool {
    spec.to_string().starts_with("file:")
}

/// Extends a file; never makes it shorter.
fn grow(path: &Path, bytes: u64) -> std::io::Result<()> {
    let file = std::fs::OpenOptions::new().write(true).open(path)?;
    if file.metadata()?.len() < bytes {
        file.set_len(bytes)?;
    }
    file.sync_all()
}

/// The size of a file or block device at this moment.
fn backing_bytes(path: &Path) -> Option<u64> {
    use std::io::{Seek, SeekFrom};
    use std::os::unix::fs::FileTypeExt;
    let metadata = std::fs::metadata(path).ok()?;
    if metadata.file_type().is_block_device() {
        return std::fs::File::open(path).ok()?.seek(SeekFrom::End(0)).ok();
    }
    metadata.is_file().then_some(metadata.len())
}
