//! Who a command runs as: parsing of `/etc/passwd` and `/etc/group`, without the name service (the binary is static).

use std::{fs, io, path::Path};

use pandastack_protocol::{Code, Failure};

/// A user as a process needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Login name, or the number for one without.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// All groups.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: String,
    /// Login shell.
    pub shell: String,
}

/// Looks a user up by name or number; empty means root. A number without an entry is a user with its own group and `/`
/// as home.
pub fn find(user: &str) -> Result<User, Failure> {
    if user.is_empty() || user == "root" {
        let passwd = read(Path::new("/etc/passwd")).unwrap_or_default();
        return Ok(parse(&passwd, "", "root").unwrap_or_else(|| unnamed(0)));
    }
    let trouble =
        |error: io::Error| Failure { code: Code::Internal, message: format!("/etc/passwd: {error}") };
    let passwd = read(Path::new("/etc/passwd")).map_err(trouble)?;
    let group = read(Path::new("/etc/group")).unwrap_or_default();
    parse(&passwd, &group, user)
        .or_else(|| user.parse().ok().map(unnamed))
        .ok_or_else(|| Failure { code: Code::NotFound, message: format!("there is no user {user:?}") })
}

fn unnamed(id: u32) -> User {
    let home = if id == 0 { "/root" } else { "/" };
    let name = if id == 0 { "root".to_owned() } else { id.to_string() };
    User { name, uid: id, gid: id, groups: vec![id], home: home.into(), shell: "/bin/sh".into() }
}

fn read(path: &Path) -> io::Result<String> {
    const LIMIT: u64 = 4 << 20;
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() || metadata.len() > LIMIT {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(String::from_utf8_lossy(&fs::read(path)?).into_owned())
}

/// The entry of a user by name or, failing that, by number.
fn parse(passwd: &str, group: &str, wanted: &str) -> Option<User> {
    let entries = || passwd.lines().filter_map(entry);
    let number: Option<u32> = wanted.parse().ok();
    let mut user = entries()
        .find(|user| user.name == wanted)
        .or_else(|| entries().find(|user| Some(user.uid) == number))?;
    for line in group.lines() {
        let mut fields = line.split(':');
        let (Some(_), Some(_), Some(gid), Some(members)) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let Ok(gid) = gid.parse() else { continue };
        if members.split(',').any(|member| member.trim() == user.name) && !user.groups.contains(&gid) {
            user.groups.push(gid);
        }
    }
    Some(user)
}

fn entry(line: &str) -> Option<User> {
    let fields: Vec<&str> = line.split(':').collect();
    let [name, _, uid, gid, _, home, shell] = fields[..] else { return None };
    let gid = gid.parse().ok()?;
    let or =
        |value: &str, default: &str| if value.is_empty() { default.to_owned() } else { value.to_owned() };
    Some(User {
        name: name.to_owned(),
        uid: uid.parse().ok()?,
        gid,
        groups: vec![gid],
        home: or(home, "/"),
        shell: or(shell, "/bin/sh"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\nbroken:x:1\npanda:x:1000:1001::/home/panda:\n";
    const GROUP: &str = "root:x:0:\nsudo:x:27:panda,other\nbad\npanda:x:1001:panda\n";

    #[test]
    fn finds_by_name_and_number_with_groups() {
        let user = parse(PASSWD, GROUP, "panda").expect("there is one");
        assert_eq!((user.uid, user.gid, user.groups.as_slice()), (1000, 1001, &[1001, 27][..]));
        assert_eq!((user.home.as_str(), user.shell.as_str()), ("/home/panda", "/bin/sh"));
        assert_eq!(parse(PASSWD, GROUP, "1000"), Some(user));
        assert_eq!(parse(PASSWD, GROUP, "broken"), None);
        assert_eq!(parse(PASSWD, GROUP, "nobody"), None);
    }

    #[test]
    fn unknown_numbers_are_users_unknown_names_are_not() {
        assert_eq!(find("4294900001").expect("a number").uid, 4_294_900_001);
        assert_eq!(find("no-such-user").expect_err("a name").code, Code::NotFound);
    }
}
