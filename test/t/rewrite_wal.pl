# online_rewrite, and what becomes of its storage elsewhere than in memory: after a
# crash with wal_level = minimal, where a file that a transaction has made is not in
# the WAL; on a standby that follows through the cut-over; on one that is promoted
# in the middle, and on the old primary that pg_rewind brings back to that; for a subscriber
# of all tables; and when xids begin anew, so that a smaller one is not an older.

use strict;
use warnings;

use File::Copy;
use LabNode;
use PostgreSQL::Test::Utils;
use Test::More;

my $rows = 20000;
my $dir = PostgreSQL::Test::Utils::tempdir;

# Every row says in a column of its own what its new value must be.
my $setup = qq{
CREATE TABLE item (id int PRIMARY KEY, v varchar(40) NOT NULL, want bigint NOT NULL, big text);
INSERT INTO item SELECT g, g * 3, g * 3, CASE WHEN g % 200 = 0 THEN
	(SELECT string_agg(md5((g * x)::text), '') FROM generate_series(1, 200) x) END FROM generate_series(1, $rows) g;
ALTER TABLE item ALTER big SET STORAGE EXTERNAL;
CREATE INDEX item_v ON item (v, id);
CREATE INDEX item_big ON item (left(big, 8));
VACUUM ANALYZE item;
};
my $migrate = q{'item', 'v', 'bigint', 'v::bigint', method => 'online_rewrite'};

sub new_server
{
	my ($name, $settings, @init) = @_;
	my $node = LabNode->new($name);
	$node->init(@init);
	$node->append_conf('postgresql.conf', "autovacuum = off\nfsync = on\nrestart_after_crash = off\n$settings");
	$node->start;
	$node->safe_psql('postgres', 'CREATE EXTENSION risky_migrations; CREATE EXTENSION amcheck');
	return $node;
}

sub check
{
	my ($node, $what, $count) = @_;
	is($node->safe_psql('postgres', 'SELECT pg_typeof(v), count(*), sum((v <> want)::int), sum((length(big) <> 6400)::int) FROM item GROUP BY 1'),
		'bigint|' . ($count // $rows) . '|0|0', "$what: every row has its value");
	is($node->safe_psql('postgres', q{SET enable_seqscan = off; SELECT count(*) FROM item WHERE v > 0}), $count // $rows, "$what: by the index too");
	is($node->safe_psql('postgres', q{SELECT count(bt_index_check(indexrelid, true)::text) FROM pg_index WHERE indrelid = 'item'::regclass}),
		3, "$what: every row is in every index");
	is($node->safe_psql('postgres', q{SELECT count(*) FROM pg_class WHERE relname ~ '^(shadow|log)_\d'}), 0, "$what: nothing is left");
	return;
}

# ---------------------------------------------------------------------------
# wal_level = minimal
# ---------------------------------------------------------------------------

foreach my $skip ('0', '1GB')
{
	# the first writes new files to disk at commit, the second puts them into the WAL
	my $name = "wal_skip_threshold $skip";
	my $node = new_server("minimal_$skip", "wal_level = minimal\nmax_wal_senders = 0\nwal_skip_threshold = $skip");
	$node->safe_psql('postgres', $setup);
	$node->safe_psql('postgres', 'CHECKPOINT');
	$node->safe_psql('postgres', "CALL rm_alter_type($migrate, cut_over => 'manual')");
	$node->stop('immediate');
	$node->start;
	$node->safe_psql('postgres', q{UPDATE item SET v = '7', want = 7 WHERE id % 50 = 0});
	$node->safe_psql('postgres', 'CALL rm_cut_over()');
	$node->safe_psql('postgres', q{UPDATE item SET v = 8, want = 8 WHERE id % 70 = 0; INSERT INTO item VALUES (0, 1, 1)});
	$node->stop('immediate');
	$node->start;
	check($node, $name, $rows + 1);
	$node->stop;
}

# ---------------------------------------------------------------------------
# Standbys
# ---------------------------------------------------------------------------

my $primary = new_server('primary', "max_standby_streaming_delay = 1s\nhot_standby_feedback = off\nwal_log_hints = on\nwal_keep_size = 1GB", allows_streaming => 1);
$primary->safe_psql('postgres', $setup);
$primary->backup('base');
my %standby;
foreach my $name ('follower', 'heir')
{
	$standby{$name} = LabNode->new($name);
	$standby{$name}->init_from_backup($primary, 'base', has_streaming => 1);
	$standby{$name}->start;
}
$primary->safe_psql('postgres', "CALL rm_alter_type($migrate, cut_over => 'manual')");
$primary->safe_psql('postgres', q{UPDATE item SET v = '9', want = 9 WHERE id % 30 = 0});
$primary->wait_for_catchup($standby{$_}, 'replay', $primary->lsn('flush')) foreach keys %standby;

# the heir goes its own way from here
$standby{heir}->promote;
$standby{heir}->safe_psql('postgres', q{UPDATE item SET v = '10', want = 10 WHERE id % 31 = 0; DELETE FROM item WHERE id = 5});
is($standby{heir}->safe_psql('postgres', q{SELECT state, next_call = format('CALL rm_cut_over(%s)', id) FROM rm_migrations}), 'open|t',
	'promoted in the middle: the view says where it stands');

$primary->safe_psql('postgres', 'CALL rm_cut_over()');
$primary->safe_psql('postgres', q{UPDATE item SET v = 11, want = 11 WHERE id % 32 = 0});
$primary->wait_for_catchup($standby{follower}, 'replay', $primary->lsn('flush'));
check($primary, 'with standbys');
check($standby{follower}, 'on the standby');
my $content = 'SELECT md5(string_agg(item::text, chr(10) ORDER BY id)) FROM item';
is($standby{follower}->safe_psql('postgres', $content), $primary->safe_psql('postgres', $content), 'it is equal to the primary');
$standby{follower}->promote;
$standby{follower}->safe_psql('postgres', q{INSERT INTO item VALUES (0, 1, 1); VACUUM item});
check($standby{follower}, 'promoted after it', $rows + 1);
$standby{follower}->stop;

# The primary has exchanged the storage, the heir has not: it goes back to that, and follows.
$primary->stop;
$standby{heir}->safe_psql('postgres', 'CHECKPOINT');
copy($primary->data_dir . '/postgresql.conf', "$dir/postgresql.conf") or die;
command_ok([ 'pg_rewind', '-D', $primary->data_dir, '--source-server', $standby{heir}->connstr('postgres') ], 'the primary is rewound');
copy("$dir/postgresql.conf", $primary->data_dir . '/postgresql.conf') or die;
$primary->enable_streaming($standby{heir});
$primary->start;
$standby{heir}->wait_for_catchup($primary, 'replay', $standby{heir}->lsn('flush'));
is($primary->safe_psql('postgres', q{SELECT pg_is_in_recovery(), state, next_call = format('CALL rm_cut_over(%s)', id) FROM rm_migrations}), 't|open|t',
	'rewound: it stands where the heir stands');
$standby{heir}->safe_psql('postgres', q{UPDATE item SET v = '12', want = 12 WHERE id % 33 = 0});
$standby{heir}->safe_psql('postgres', 'CALL rm_cut_over()');
check($standby{heir}, 'promoted in the middle', $rows - 1);
$standby{heir}->wait_for_catchup($primary, 'replay', $standby{heir}->lsn('flush'));
check($primary, 'rewound', $rows - 1);
is($primary->safe_psql('postgres', $content), $standby{heir}->safe_psql('postgres', $content), 'rewound: it is equal to the heir');
$primary->stop;
$standby{heir}->stop;

# ---------------------------------------------------------------------------
# A subscriber
# ---------------------------------------------------------------------------

# It subscribed to all tables before the extension came, and is told of nothing.  It is in
# another database of the same server.
my $publisher = new_server('publisher', 'fsync = off', allows_streaming => 'logical');
$publisher->safe_psql('postgres', $_) foreach 'DROP EXTENSION risky_migrations', $setup, 'CREATE PUBLICATION everything FOR ALL TABLES',
	q{SELECT pg_create_logical_replication_slot('far', 'pgoutput')}, 'CREATE DATABASE there';
$publisher->safe_psql('there', 'CREATE TABLE item (id int PRIMARY KEY, v text NOT NULL, want bigint NOT NULL, big text)');
$publisher->safe_psql('there', sprintf q{CREATE SUBSCRIPTION far CONNECTION '%s dbname=postgres' PUBLICATION everything WITH (create_slot = false)}, $publisher->connstr);
$publisher->safe_psql('postgres', 'CREATE EXTENSION risky_migrations');

sub is_there
{
	my ($what) = @_;
	my $all = q{SELECT md5(string_agg(concat_ws(' ', id, v, want, big), chr(10) ORDER BY id)) FROM item};
	my $here = $publisher->safe_psql('postgres', $all);
	ok($publisher->poll_query_until('there', "SELECT ($all) = '$here'"), "subscriber: it has $what");
	return;
}

is_there('all rows');
$publisher->safe_psql('postgres', "CALL rm_alter_type($migrate, cut_over => 'manual')");
$publisher->safe_psql('postgres', q{UPDATE item SET v = '9', want = 9 WHERE id % 30 = 0; DELETE FROM item WHERE id = 8});
is_there('what was written before the exchange');
$publisher->safe_psql('postgres', 'CALL rm_cut_over()');
$publisher->safe_psql('postgres', q{UPDATE item SET v = 8000000000, want = 8000000000 WHERE id % 40 = 0; DELETE FROM item WHERE id = 9; INSERT INTO item VALUES (0, 1, 1)});
is_there('what was written after it');
$publisher->safe_psql('there', 'DROP SUBSCRIPTION far');
$publisher->stop;

# ---------------------------------------------------------------------------
# Xids that begin anew
# ---------------------------------------------------------------------------

my $node = new_server('anew', 'max_prepared_transactions = 5');
$node->safe_psql('postgres', $setup);
$node->safe_psql('postgres', 'ALTER DATABASE template0 ALLOW_CONNECTIONS true');

# No xid may be more than 2^31 ahead of the oldest, so it takes some leaps.
foreach my $xid (2000000000, 4000000000, 4294966000)
{
	$node->command_ok([ 'vacuumdb', '-a', '-q', '--freeze' ], "all is frozen before $xid");
	$node->stop;
	my $xact = $node->data_dir . '/pg_xact/' . sprintf '%04X', $xid / 1048576;
	append_to_file($xact, "\0" x 262144) if !-e $xact;
	command_ok([ 'pg_resetwal', '-x', $xid, '-D', $node->data_dir ], "the next xid is $xid");
	$node->start;
}
is($node->safe_psql('postgres', 'SELECT txid_current() < 4294967296'), 't', 'not yet');
$node->safe_psql('postgres', q{BEGIN; UPDATE item SET v = '12', want = 12 WHERE id = 3; PREPARE TRANSACTION 'other'; COMMIT PREPARED 'other'});
append_to_file("$dir/write.sql", q{
\set id random(1, 20000)
\set x random(1, 1000000000)
UPDATE item SET v = :x, want = :x WHERE id = :id;
});
my $write = [ 'pgbench', '-n', '-c', '2', '-t', '1500', '-f', "$dir/write.sql", $node->connstr('postgres') ];
$node->safe_psql('postgres', "CALL rm_alter_type($migrate, cut_over => 'manual')");
my $before = $node->safe_psql('postgres', 'SELECT txid_current()');
command_ok($write, 'clients write');
is($node->safe_psql('postgres', "SELECT $before < 4294967296 AND txid_current() > 4294967296"), 't', 'now xids have begun anew');
$node->safe_psql('postgres', 'CALL rm_cut_over()');
check($node, 'across the end of the xids');

# and the whole of it with rows from before, of every age
$node->safe_psql('postgres', q{CALL rm_alter_type('item', 'v', 'numeric', method => 'online_rewrite')});
is($node->safe_psql('postgres', 'SELECT count(*) FROM item WHERE v = want'), $rows, 'with rows of both sides of it');
$node->safe_psql('postgres', 'VACUUM FREEZE item');
is($node->safe_psql('postgres', q{SELECT count(*) FROM verify_heapam('item')}), 0, 'all pages are sound');
$node->stop;

done_testing();
