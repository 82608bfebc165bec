/*-------------------------------------------------------------------------
 *
 * compat.h
 *	  Differences between PostgreSQL 15, 16, 17 and 18.
 *
 * The only place with #if PG_VERSION_NUM: everything else is written against
 * the wrappers here, which have the shape of the newest version's functions.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#ifndef RM_COMPAT_H
#define RM_COMPAT_H

#include "access/genam.h"
#include "access/htup_details.h"
#include "access/tableam.h"
#include "access/xloginsert.h"
#include "catalog/index.h"
#include "catalog/pg_authid.h"
#include "catalog/pg_class.h"
#include "catalog/pg_database.h"
#include "catalog/pg_namespace.h"
#include "commands/defrem.h"
#include "executor/executor.h"
#include "miscadmin.h"
#include "parser/parse_type.h"
#include "postmaster/bgworker.h"
#include "replication/slot.h"
#include "storage/bufmgr.h"
#include "storage/lmgr.h"
#include "storage/lock.h"
#include "storage/proc.h"
#include "storage/procarray.h"
#include "storage/sinvaladt.h"
#include "tcop/pquery.h"
#include "utils/acl.h"
#include "utils/regproc.h"
#include "utils/guc_tables.h"
#include "utils/syscache.h"
#include "utils/wait_event.h"

#if PG_VERSION_NUM < 150000
#error risky_migrations needs PostgreSQL 15 or later
#endif

/* which indexes must be told of a new row version: summarizing ones are 16+ */
#if PG_VERSION_NUM < 160000
typedef bool RmUpdateIndexes;

#define rm_update_needs_indexes(u) (u)
#define rm_update_was_hot(u) (!(u))
#else
typedef TU_UpdateIndexes RmUpdateIndexes;

#define rm_update_needs_indexes(u) ((u) != TU_None)
#define rm_update_was_hot(u) ((u) != TU_All)
#endif

/* index entries for a row version that an update has just stored */
static inline void
rm_insert_index_tuples(ResultRelInfo *rri, TupleTableSlot *slot,
					   EState *estate, RmUpdateIndexes update_indexes)
{
#if PG_VERSION_NUM < 160000
	list_free(ExecInsertIndexTuples(rri, slot, estate, true, false, NULL, NIL));
#else
	list_free(ExecInsertIndexTuples(rri, slot, estate, true, false, NULL, NIL,
									update_indexes == TU_Summarizing));
#endif
}

/* may the role make something in the schema? */
static inline bool
rm_may_create_in(Oid nspid, Oid roleid)
{
#if PG_VERSION_NUM < 160000
	return pg_namespace_aclcheck(nspid, roleid, ACL_CREATE) == ACLCHECK_OK;
#else
	return object_aclcheck(NamespaceRelationId, nspid, roleid, ACL_CREATE) == ACLCHECK_OK;
#endif
}

/* may the role make temporary tables in this database? */
static inline bool
rm_may_make_temporary(Oid roleid)
{
#if PG_VERSION_NUM < 160000
	return pg_database_aclcheck(MyDatabaseId, roleid, ACL_CREATE_TEMP) == ACLCHECK_OK;
#else
	return object_aclcheck(DatabaseRelationId, MyDatabaseId, roleid, ACL_CREATE_TEMP) == ACLCHECK_OK;
#endif
}

/* the process behind a virtual transaction id; NULL if it is gone */
static inline PGPROC *
rm_backend_proc(VirtualTransactionId vxid)
{
#if PG_VERSION_NUM < 170000
	return BackendIdGetProc(vxid.backendId);
#else
	return ProcNumberGetProc(vxid.procNumber);
#endif
}

/* does the role own the relation, or may it act as the owner? */
static inline bool
rm_owns_relation(Oid relid, Oid roleid)
{
#if PG_VERSION_NUM < 160000
	return pg_class_ownercheck(relid, roleid);
#else
	return object_ownercheck(RelationRelationId, relid, roleid);
#endif
}

/*
 * Flags with which our background workers connect.  They act for a session
 * that is connected already, so a database that takes no new connections does
 * not stop them, nor, where the flag exists, a role that may not log in.
 */
#if PG_VERSION_NUM < 170000
#define RM_WORKER_CONNECT_FLAGS BGWORKER_BYPASS_ALLOWCONN
#else
#define RM_WORKER_CONNECT_FLAGS \
	(BGWORKER_BYPASS_ALLOWCONN | BGWORKER_BYPASS_ROLELOGINCHECK)
#endif

/* can a worker connect as this role?  Before 17 only as one that may log in */
static inline bool
rm_worker_can_be(Oid roleid)
{
#if PG_VERSION_NUM < 170000
	HeapTuple	tuple = SearchSysCache1(AUTHOID, ObjectIdGetDatum(roleid));
	bool		can_login = false;

	if (HeapTupleIsValid(tuple))
	{
		can_login = ((Form_pg_authid) GETSTRUCT(tuple))->rolcanlogin;
		ReleaseSysCache(tuple);
	}
	return can_login;
#else
	return true;
#endif
}

/* a wait event of that name; before 17 extensions share one without a name */
static inline uint32
rm_wait_event(const char *name)
{
#if PG_VERSION_NUM < 170000
	return PG_WAIT_EXTENSION;
#else
	return WaitEventExtensionNew(name);
#endif
}

/* runs a portal to its end */
static inline void
rm_portal_run(Portal portal, bool is_top_level, DestReceiver *dest)
{
#if PG_VERSION_NUM < 180000
	(void) PortalRun(portal, FETCH_ALL, is_top_level, true, dest, dest, NULL);
#else
	(void) PortalRun(portal, FETCH_ALL, is_top_level, dest, dest, NULL);
#endif
}

/* all settings that this backend knows */
static inline struct config_generic **
rm_guc_variables(int *count)
{
#if PG_VERSION_NUM < 160000
	*count = GetNumConfigOptions();
	return get_guc_variables();
#else
	return get_guc_variables(count);
#endif
}

/* does this backend hold exactly this lock?  Looks at its own table only */
static inline bool
rm_holds_lock(const LOCKTAG *tag, LOCKMODE mode)
{
#if PG_VERSION_NUM < 170000
	return LockHeldByMe(tag, mode);
#else
	return LockHeldByMe(tag, mode, false);
#endif
}

/* does the slot still retain anything?  The caller holds its mutex */
static inline bool
rm_slot_is_valid(const ReplicationSlot *slot)
{
#if PG_VERSION_NUM < 160000
	return XLogRecPtrIsInvalid(slot->data.invalidated_at);
#else
	return slot->data.invalidated == RS_INVAL_NONE;
#endif
}

/* parses a type's name; PostgreSQL's errors if it is none */
static inline void
rm_parse_type(const char *name, Oid *type, int32 *typmod)
{
#if PG_VERSION_NUM < 160000
	parseTypeString(name, type, typmod, false);
#else
	(void) parseTypeString(name, type, typmod, NULL);
#endif
}

/* parts of a possibly qualified, possibly quoted name (42602 if it is none) */
static inline List *
rm_qualified_name_list(const char *name)
{
#if PG_VERSION_NUM < 160000
	return stringToQualifiedNameList(name);
#else
	return stringToQualifiedNameList(name, NULL);
#endif
}

/* an attribute in a descriptor of our own has been changed; NOT NULL in it is valid */
static inline void
rm_attribute_changed(TupleDesc desc, int i)
{
#if PG_VERSION_NUM >= 180000
	populate_compact_attribute(desc, i);
	if (TupleDescAttr(desc, i)->attnotnull)
		TupleDescCompactAttr(desc, i)->attnullability = ATTNULLABLE_VALID;
#endif
}

/* is the column of a relation NOT NULL, for the rows too that are there already? */
static inline bool
rm_attribute_not_null(TupleDesc desc, int i)
{
#if PG_VERSION_NUM >= 180000
	return TupleDescCompactAttr(desc, i)->attnullability == ATTNULLABLE_VALID;
#else
	return TupleDescAttr(desc, i)->attnotnull;
#endif
}

/* gives a relation new, empty storage; the old one goes at commit */
static inline void
rm_set_new_storage(Relation rel)
{
#if PG_VERSION_NUM < 160000
	RelationSetNewRelfilenode(rel, rel->rd_rel->relpersistence);
#else
	RelationSetNewRelfilenumber(rel, rel->rd_rel->relpersistence);
#endif
}

/* is the relation's storage of this transaction? */
static inline bool
rm_storage_is_new(Relation rel)
{
	if (rel->rd_createSubid != InvalidSubTransactionId)
		return true;
#if PG_VERSION_NUM < 160000
	return rel->rd_firstRelfilenodeSubid != InvalidSubTransactionId;
#else
	return rel->rd_firstRelfilelocatorSubid != InvalidSubTransactionId;
#endif
}

/* this backend knows that the relation's storage is of this subtransaction */
static inline void
rm_assume_new_storage(Relation rel)
{
#if PG_VERSION_NUM < 160000
	RelationAssumeNewRelfilenode(rel);
#else
	RelationAssumeNewRelfilelocator(rel);
#endif
}

/* ... that it is older than this transaction */
static inline void
rm_assume_old_storage(Relation rel)
{
	rel->rd_createSubid = InvalidSubTransactionId;
#if PG_VERSION_NUM < 160000
	rel->rd_newRelfilenodeSubid = InvalidSubTransactionId;
	rel->rd_firstRelfilenodeSubid = InvalidSubTransactionId;
#else
	rel->rd_newRelfilelocatorSubid = InvalidSubTransactionId;
	rel->rd_firstRelfilelocatorSubid = InvalidSubTransactionId;
#endif
}

/* for expressions of indexes and the like, from 17 on; until the GUC nest level ends */
static inline void
rm_restrict_search_path(void)
{
#if PG_VERSION_NUM >= 170000
	RestrictSearchPath();
#endif
}

/* 72000 if what the snapshot should see may be gone (old_snapshot_threshold, up to 16) */
static inline void
rm_test_for_old_snapshot(Snapshot snapshot, Relation rel, Page page)
{
#if PG_VERSION_NUM < 170000
	TestForOldSnapshot(snapshot, rel, page);
#endif
}

/* the 256 kB that a sequential scan has; from 18 on it is mostly ten times as much */
static inline BufferAccessStrategy
rm_small_ring(void)
{
#if PG_VERSION_NUM < 160000
	return GetAccessStrategy(BAS_BULKREAD);
#else
	return GetAccessStrategyWithSize(BAS_BULKREAD, 256);
#endif
}

/* defines an index that is still to be built, without checks of privileges */
static inline Oid
rm_define_empty_index(Oid relid, IndexStmt *stmt)
{
#if PG_VERSION_NUM < 160000
	return DefineIndex(relid, stmt, InvalidOid, InvalidOid, InvalidOid,
					   false, false, false, true, true).objectId;
#else
	return DefineIndex(relid, stmt, InvalidOid, InvalidOid, InvalidOid, -1,
					   false, false, false, true, true).objectId;
#endif
}

/* index entries for a row that has just been stored; errors of unique indexes */
static inline void
rm_insert_new_index_tuples(ResultRelInfo *rri, TupleTableSlot *slot, EState *estate)
{
#if PG_VERSION_NUM < 160000
	list_free(ExecInsertIndexTuples(rri, slot, estate, false, false, NULL, NIL));
#else
	list_free(ExecInsertIndexTuples(rri, slot, estate, false, false, NULL, NIL, false));
#endif
}

static inline IndexScanDesc
rm_index_beginscan(Relation heap, Relation index, Snapshot snapshot, int nkeys)
{
#if PG_VERSION_NUM < 180000
	return index_beginscan(heap, index, snapshot, nkeys, 0);
#else
	return index_beginscan(heap, index, snapshot, NULL, nkeys, 0);
#endif
}

/* images of so many pages of the relation's main fork, into the WAL */
static inline void
rm_log_new_pages(Relation rel, int n, BlockNumber *blocks, Page *pages)
{
#if PG_VERSION_NUM < 160000
	log_newpages(&rel->rd_node, MAIN_FORKNUM, n, blocks, pages, true);
#else
	log_newpages(&rel->rd_locator, MAIN_FORKNUM, n, blocks, pages, true);
#endif
}

/* exchanges what pg_class says of the pages that are all-frozen, where it does */
static inline void
rm_swap_all_frozen(Form_pg_class a, Form_pg_class b)
{
#if PG_VERSION_NUM >= 180000
	int32		swap = a->relallfrozen;

	a->relallfrozen = b->relallfrozen;
	b->relallfrozen = swap;
#endif
}

/* does ANALYZE of a table also analyze those that inherit from it? */
#define RM_ANALYZE_DESCENDS		(PG_VERSION_NUM >= 180000)

/* does a partition's column have its parent's identity? */
#define RM_IDENTITY_IS_INHERITED	(PG_VERSION_NUM >= 170000)

#endif							/* RM_COMPAT_H */
