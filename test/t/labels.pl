# Security labels: a table that has them has the same after online_rewrite as after
# ALTER TABLE, and what is made again has its own.  three_step says before it begins
# what it cannot carry over, and carries over the rest.
#
# No package of Debian has a provider that takes any label; this test makes one.

use strict;
use warnings;

use LabServer;
use PostgreSQL::Test::Utils;
use Test::More;

my $dir = PostgreSQL::Test::Utils::tempdir;

sub make_provider
{
	my ($node) = @_;

	append_to_file(
		"$dir/provider.c", q{
#include "postgres.h"

#include "commands/seclabel.h"
#include "fmgr.h"

PG_MODULE_MAGIC;

void _PG_init(void);

static void
take_any(const ObjectAddress *object, const char *label)
{
	(void) object;
	(void) label;
}

void
_PG_init(void)
{
	register_label_provider("a provider", take_any);
}
});
	system_or_bail('gcc', '-shared', '-fPIC', '-I' . $node->config_data('--includedir-server'),
		'-o', "$dir/provider.so", "$dir/provider.c");
	return;
}

my $node = start_server('labels', 'autovacuum = off');
make_provider($node);
$node->append_conf('postgresql.conf', "shared_preload_libraries = '$dir/provider'");
$node->restart;

my $view = q{
	CREATE VIEW item_view AS SELECT id, v AS "V" FROM item;
	SECURITY LABEL FOR "a provider" ON VIEW item_view IS 'a "view"''s';
	SECURITY LABEL FOR "a provider" ON COLUMN item_view."V" IS 'its column';
	SECURITY LABEL FOR "a provider" ON TYPE item_view IS 'a row of it';
};
my $stored = q{
	CREATE MATERIALIZED VIEW item_stored AS SELECT v FROM item;
	SECURITY LABEL FOR "a provider" ON MATERIALIZED VIEW item_stored IS 'stored';
	SECURITY LABEL FOR "a provider" ON COLUMN item_stored.v IS 'its column, stored';
};

sub make_table
{
	sql(qq{
		DROP TABLE IF EXISTS item CASCADE;
		CREATE TABLE item (id int PRIMARY KEY, v text NOT NULL, w text);
		INSERT INTO item SELECT g, g, g FROM generate_series(1, 500) g;
		CREATE INDEX ON item (v);
		SECURITY LABEL FOR "a provider" ON TABLE item IS 'the table';
		SECURITY LABEL FOR "a provider" ON COLUMN item.v IS 'what changes';
		SECURITY LABEL FOR "a provider" ON COLUMN item.w IS 'what stays';
		$view
	});
	return;
}

# pg_dump does not tell of the labels of a row type
my $labels = q{SELECT string_agg(concat_ws('|', i.type, i.identity, l.label), E'\n' ORDER BY l.label COLLATE "C")
	FROM pg_seclabel l, pg_identify_object(l.classoid, l.objoid, l.objsubid) i};

sub all_of { return dump_of('-t', 'item*') . sql($labels) . "\n" }

make_table();
my $before = all_of();
is(() = $before =~ /^SECURITY LABEL/mg, 5, 'pg_dump tells of the labels');
sql("DROP VIEW item_view; ALTER TABLE item ALTER v TYPE bigint USING v::bigint; $view");
my $altered = all_of();

foreach my $way ('CALL rm_cut_over()', 'CALL rm_rollback()')
{
	make_table();
	sql(q{CALL rm_alter_type('item', 'v', 'bigint', 'v::bigint', 'online_rewrite', cut_over => 'manual')});
	sql($way);
	is(all_of(), $way =~ /rollback/ ? $before : $altered, "the labels after $way");
}

# a label that is set or taken away while the migration runs
make_table();
sql(q{CALL rm_alter_type('item', 'v', 'bigint', 'v::bigint', 'online_rewrite', cut_over => 'manual')});
sql(q{SECURITY LABEL FOR "a provider" ON COLUMN item.v IS NULL;
	SECURITY LABEL FOR "a provider" ON COLUMN item.id IS 'set meanwhile';
	SECURITY LABEL FOR "a provider" ON VIEW item_view IS 'another'});
sql('CALL rm_cut_over()');
is(sql($labels), q{type|public.item_view|a row of it
view|public.item_view|another
view column|public.item_view."V"|its column
table column|public.item.id|set meanwhile
table|public.item|the table
table column|public.item.w|what stays}, 'labels of the meantime');
is(sql('SELECT sum(v), count(*) FROM item'), 500 * 501 / 2 . '|500', 'and the rows');

# three_step
make_table();
sql($stored);
my $with_stored = sql($labels);
my (undef, undef, $error) = $node->psql('postgres',
	q{SET risky_migrations.recreate_matviews = on; CALL rm_alter_type('item', 'v', 'bigint', 'v::bigint', 'three_step')});
like($error, qr/security label.*a provider.*Remove the label/s, 'three_step: the label of the column is an obstacle');
is(sql($labels), $with_stored, 'and nothing has been changed');
sql(q{SECURITY LABEL FOR "a provider" ON COLUMN item.v IS NULL;
	SET risky_migrations.recreate_matviews = on;
	CALL rm_alter_type('item', 'v', 'bigint', 'v::bigint', 'three_step');
	CALL rm_cleanup();
	SECURITY LABEL FOR "a provider" ON COLUMN item.v IS 'what changes'});
is(sql($labels), $with_stored, 'without it all others are as they were');

$node->stop;
done_testing();
