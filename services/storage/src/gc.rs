//! What is no longer needed. Pure: lists in, list out.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use crate::{bake::BakeId, identity::Digest, template::TemplateName};

/// What is on the data partition, by path.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Found {
    /// Template directories, each with its bakes.
    pub templates: Vec<(PathBuf, Vec<PathBuf>)>,
    /// Artefacts.
    pub artefacts: Vec<PathBuf>,
}

/// What has to stay.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Wanted {
    /// The catalogue, each with the bake that fits this machine and image, if that is there and whole.
    pub templates: BTreeMap<TemplateName, Option<BakeId>>,
    /// Artefacts of the running image.
    pub artefacts: BTreeSet<Digest>,
}

/// The paths to remove.
///
/// Sandboxes need none of them: a hard link or a reflink keeps what it has, whatever happens to the name. An empty
/// catalogue means that its partition is missing, not that all templates are gone: nothing of theirs is removed then.
pub fn plan(found: &Found, wanted: &Wanted) -> Vec<PathBuf> {
    let mut removals = Vec::new();
    for (template, bakes) in &found.templates {
        match name(template).and_then(|name| wanted.templates.get(&name)) {
            _ if wanted.templates.is_empty() => {}
            None => removals.push(template.clone()),
            Some(keep) => {
                let stale = |bake: &&PathBuf| keep.as_ref().map(BakeId::as_str) != text(bake);
                removals.extend(bakes.iter().filter(stale).cloned());
            }
        }
    }
    // Files that are not named by a digest (`current.json`) are not artefacts.
    let artefact = |path: &&PathBuf| {
        text(path)
            .and_then(|name| name.parse::<Digest>().ok())
            .is_some_and(|digest| !wanted.artefacts.contains(&digest))
    };
    removals.extend(found.artefacts.iter().filter(artefact).cloned());
    removals
}

fn text(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()
}

fn name(path: &Path) -> Option<TemplateName> {
    text(path)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bake(number: u8) -> BakeId {
        BakeId::from(&Digest::of(&[number]))
    }

    fn digest(number: u8) -> Digest {
        Digest::of(&[number, 1])
    }

    fn template_path(number: u8) -> PathBuf {
        format!("/t/template-{number}").into()
    }

    prop_compose! {
        fn found()(
            templates in prop::collection::btree_map(0..6u8, prop::collection::btree_set(0..5u8, 0..4), 0..6),
            artefacts in prop::collection::btree_set(0..8u8, 0..8),
        ) -> Found {
            Found {
                templates: templates
                    .into_iter()
                    .map(|(t, bakes)| {
                        let path = template_path(t);
                        let bakes = bakes.into_iter().map(|b| path.join("bakes").join(bake(b).as_str())).collect();
                        (path, bakes)
                    })
                    .collect(),
                artefacts: artefacts.into_iter().map(|a| PathBuf::from("/a").join(digest(a).as_str())).collect(),
            }
        }
    }

    prop_compose! {
        fn wanted()(
            templates in prop::collection::btree_map(0..6u8, prop::option::of(0..5u8), 0..6),
            artefacts in prop::collection::btree_set(0..8u8, 0..8),
        ) -> Wanted {
            Wanted {
                templates: templates
                    .into_iter()
                    .map(|(t, b)| (format!("template-{t}").parse().unwrap(), b.map(bake)))
                    .collect(),
                artefacts: artefacts.into_iter().map(digest).collect(),
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_wanted_stays_and_the_rest_goes(found in found(), wanted in wanted()) {
            let removals = plan(&found, &wanted);
            for (template, bakes) in &found.templates {
                let entry = wanted.templates.get(&name(template).unwrap());
                prop_assert_eq!(removals.contains(template), entry.is_none() && !wanted.templates.is_empty());
                for path in bakes {
                    let kept = entry.is_some_and(|keep| keep.as_ref().map(BakeId::as_str) == text(path));
                    let goes = removals.iter().any(|removal| path.starts_with(removal));
                    prop_assert_eq!(goes, !kept && !wanted.templates.is_empty());
                }
            }
            for path in &found.artefacts {
                let kept = wanted.artefacts.contains(&text(path).unwrap().parse().unwrap());
                prop_assert_eq!(removals.contains(path), !kept);
            }
            let mut once = removals.clone();
            once.dedup();
            prop_assert_eq!(once.len(), removals.len());
        }
    }

    #[test]
    fn what_is_not_named_by_us_is_judged_with_care() {
        let found = Found {
            templates: vec![
                ("/t/bad name".into(), vec![]),
                ("/t/base".into(), vec!["/t/base/bakes/junk".into()]),
            ],
            artefacts: vec!["/a/current.json".into(), "/a/.current.json.1-1.tmp".into()],
        };
        let wanted = Wanted { templates: [("base".parse().unwrap(), None)].into(), ..Wanted::default() };

        assert_eq!(plan(&found, &wanted), [PathBuf::from("/t/bad name"), "/t/base/bakes/junk".into()]);
    }
}
