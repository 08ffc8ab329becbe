//! The user a process becomes once everything that needs its starter's rights is done.
//!
//! Listeners and sockets are made before; volumes, the data directory and all that comes at run time
//! are opened as the user, so that what works at the start works later, too.

use std::fs;
use std::path::Path;

use anyhow::{Context, anyhow, bail, ensure};
use rustix::process::{Gid, Uid};

use crate::contain;

/// An account of this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    uid: u32,
    gid: u32,
    /// The other groups it is in.
    groups: Vec<u32>,
}

impl User {
    /// By name, by number, or by both numbers (`UID:GID`). A number without an account has the group
    /// of the same number.
    pub(crate) fn find(text: &str) -> anyhow::Result<User> {
        let read = |path| fs::read_to_string(path).with_context(|| format!("reading {path}"));
        find(text, &read("/etc/passwd")?, &read("/etc/group")?).ok_or_else(|| {
            anyhow!(
                "user {text:?}: there is none; allowed: a name in /etc/passwd, a number, or \
                 USER:GROUP as numbers"
            )
        })
    }

    /// Gives a socket to the user, so that those in its group can connect.
    pub(crate) fn own(&self, path: &Path) -> anyhow::Result<()> {
        std::os::unix::fs::lchown(path, Some(self.uid), Some(self.gid))
            .with_context(|| format!("giving {} to user {}", path.display(), self.uid))
    }

    /// Becomes the user for good. To be called while the process has one thread: the kernel changes
    /// the calling one and those it starts.
    pub(crate) fn become_it(&self) -> anyhow::Result<()> {
        let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
        let is_it = rustix::process::getuid() == uid
            && rustix::process::geteuid() == uid
            && rustix::process::getgid() == gid
            && rustix::process::getegid() == gid;
        if !is_it {
            let threads = contain::threads();
            ensure!(
                threads == Some(1),
                "the process has {threads:?} threads and cannot become user {}",
                self.uid
            );
            let groups: Vec<Gid> = self.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
            rustix::thread::set_thread_groups(&groups)
                .and_then(|()| rustix::thread::set_thread_res_gid(gid, gid, gid))
                .and_then(|()| rustix::thread::set_thread_res_uid(uid, uid, uid))
                .with_context(|| {
                    format!("becoming user {} (start as root, or as that user)", self.uid)
                })?;
            if self.uid != 0 && rustix::thread::set_thread_res_uid(Uid::ROOT, uid, uid).is_ok() {
                bail!("the process is user {} and can still be root", self.uid);
            }
        }
        rustix::thread::set_no_new_privs(true)?;
        tracing::info!(uid = self.uid, gid = self.gid, "user");
        Ok(())
    }
}

/// Looks a user up in the text of both files.
fn find(text: &str, passwd: &str, group: &str) -> Option<User> {
    if let Some((uid, gid)) = text.split_once(':') {
        return Some(User { uid: uid.parse().ok()?, gid: gid.parse().ok()?, groups: Vec::new() });
    }
    let number: Option<u32> = text.parse().ok();
    let account = passwd.lines().find_map(|line| {
        // name:password:uid:gid:...
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        (name == text || number == Some(uid)).then_some((name, uid, gid))
    });
    let Some((name, uid, gid)) = account else {
        return number.map(|uid| User { uid, gid: uid, groups: Vec::new() });
    };
    let groups = group.lines().filter_map(|line| {
        // name:password:gid:member,member
        let mut fields = line.split(':').skip(2);
        let gid = fields.next()?.parse().ok()?;
        fields.next()?.split(',').any(|member| member == name).then_some(gid)
    });
    Some(User { uid, gid, groups: groups.collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_are_found_by_name_and_by_number() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nodd line\ndisks:x:990:991::/:/bin/false\n";
        let group = "root:x:0:\ndisk:x:6:other,disks\nkvm:x:108:disks\nnone:x:7:disks2\n";
        let find = |text| super::find(text, passwd, group);
        let disks = User { uid: 990, gid: 991, groups: vec![6, 108] };
        assert_eq!(find("disks"), Some(disks.clone()));
        assert_eq!(find("990"), Some(disks));
        assert_eq!(find("990:5"), Some(User { uid: 990, gid: 5, groups: Vec::new() }));
        assert_eq!(find("4242"), Some(User { uid: 4242, gid: 4242, groups: Vec::new() }));
        for wrong in ["nobody-here", "", "1:x", "-1", "odd line"] {
            assert_eq!(find(wrong), None, "{wrong}");
        }
    }
}
